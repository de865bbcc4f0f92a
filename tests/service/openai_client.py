"""The real OpenAI client over an application in this process."""

from __future__ import annotations

import httpx2
from fastapi.testclient import TestClient
from openai import OpenAI


class _InProcess(httpx2.BaseTransport):
    """Hands the client's requests to a TestClient, byte for byte."""

    def __init__(self, client: TestClient) -> None:
        self._client = client

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.raw_path.decode()
        headers = [(name, value) for name, value in request.headers.multi_items() if name.lower() != "authorization"]
        answer = self._client.request(request.method, path, headers=headers, content=request.read())
        return httpx2.Response(answer.status_code, headers=answer.headers.multi_items(), content=answer.content)


def openai_client(client: TestClient) -> OpenAI:
    """The OpenAI client, with the key of a TestClient and without retries."""
    key = client.headers["authorization"].removeprefix("Bearer ")
    http = httpx2.Client(transport=_InProcess(client))
    return OpenAI(api_key=key, base_url="http://testserver/v1", http_client=http, max_retries=0)

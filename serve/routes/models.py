"""`/v1/models`: the base model and the plug-ins that may be served now.

Promoting and withdrawing plug-ins is done in the registry, not here."""

from __future__ import annotations

from fastapi import APIRouter, Request

from serve.failures import model_not_found
from serve.routes import backend_of
from serve.wire.models import ModelCard, ModelList

router = APIRouter(prefix="/v1")


@router.get("/models")
async def list_models(request: Request) -> ModelList:
    """Every model, the base model first."""
    return ModelList(data=await backend_of(request).models())


@router.get("/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> ModelCard:
    """One model; an id that is not served is a 404."""
    for card in await backend_of(request).models():
        if card.id == model_id:
            return card
    raise model_not_found(model_id)

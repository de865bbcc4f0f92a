"""A customer that has Transformers and PEFT, and nothing of this project: downloads a bundle, tunes it, sends it back.

`python plain_customer.py URL KEY FOLDER` writes what came of it to FOLDER/answer.json. A script, run by a test."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import urllib.request
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["the cat sat on the mat", "the dog lay on the log", "the hen ran to the den", "the fox hid in the box"]
FILES = ("adapter_config.json", "adapter_model.safetensors")
LEARNING_RATE, STEPS = 1e-3, 12


def call(url: str, key: str, method: str = "GET", body: bytes | None = None, kind: str = "application/json") -> bytes:
    request = urllib.request.Request(url, body, {"authorization": f"Bearer {key}", "content-type": kind}, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()


def ask(url: str, key: str, method: str = "GET", body: Any = None) -> dict[str, Any]:
    return json.loads(call(url, key, method, None if body is None else json.dumps(body).encode()))


def download(url: str, key: str, folder: Path) -> dict[str, Any]:
    """Fetch the first bundle that is offered; its manifest."""
    bundle = ask(f"{url}/offsite/bundles", key)["data"][0]
    for file in bundle["files"]:
        data = call(f"{url}/offsite/bundles/{bundle['id']}/files/{file['name']}", key)
        assert hashlib.sha256(data).hexdigest() == file["sha256"] and len(data) == file["bytes"], file
        path = folder / file["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return json.loads((folder / "manifest.json").read_text())


def tune(bundle: Path, plan: dict[str, int], adapter: Path) -> list[float]:
    """LoRA on the first and last layers, in a plain loop; the losses."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32)
    depth = plan["bottom"] + plan["keep"] + plan["top"]
    positions = [*range(plan["bottom"]), *range(depth - plan["top"], depth)]
    wanted = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=positions,
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, wanted)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=LEARNING_RATE)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(STEPS):
        loss = tuned(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tuned.save_pretrained(adapter)
    return losses


def upload(url: str, key: str, bundle: dict[str, Any], adapter: Path) -> dict[str, Any]:
    """Send the adapter with its manifest, and wait for the verdict."""
    entries = {}
    for name in FILES:
        data = (adapter / name).read_bytes()
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {
        "schema_version": 1,
        **{name: bundle[name] for name in ("bundle_id", "model", "version")},
        "method": "lora",
        "files": entries,
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "created": datetime.now(timezone.utc).isoformat(),
    }
    (adapter / "manifest.json").write_text(json.dumps(manifest))
    text = (adapter / "manifest.json").read_bytes()
    entries["manifest.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    files = [{"name": name, **entry} for name, entry in entries.items()]
    asked = {"bundle_id": bundle["bundle_id"], "suffix": "home", "files": files}
    place = f"{url}/offsite/adapters"
    place += "/" + ask(place, key, "POST", asked)["id"]
    for name in entries:
        call(f"{place}/files/{name}", key, "PUT", (adapter / name).read_bytes(), "application/octet-stream")
    verdict = ask(f"{place}/complete", key, "POST")
    deadline = time.monotonic() + 600
    while verdict["state"] not in ("accepted", "rejected") and time.monotonic() < deadline:
        time.sleep(0.3)
        verdict = ask(place, key)
    return verdict


def main(url: str, key: str, folder: str) -> None:
    bundle, adapter = Path(folder, "bundle"), Path(folder, "adapter")
    manifest = download(url, key, bundle)
    losses = tune(bundle, manifest["plan"], adapter)
    verdict = upload(url, key, manifest, adapter)
    found = {"losses": losses, "verdict": verdict, "text": None}
    if verdict["model_id"]:
        asked = {"model": verdict["model_id"], "prompt": "the cat", "max_tokens": 4, "temperature": 0}
        found["text"] = ask(f"{url}/completions", key, "POST", asked)["choices"][0]["text"]
    found["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    Path(folder, "answer.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

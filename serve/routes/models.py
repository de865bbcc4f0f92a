"""`/v1/models`: the base model and the asker's own plug-ins that are in service.

Promoting is the controller's part; withdrawing is done here, and seen by every engine within moments."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from ot_ray.artifacts import Registry, parse_model_name
from ot_ray.errors import NotFoundError
from serve.failures import ApiError, model_not_found
from serve.routes import service_of
from serve.routes.generating import check_model
from serve.routes.identity import Identity, needs, noted, record
from serve.wire.models import DeletedModel, ModelCard, ModelList

router = APIRouter(prefix="/v1")


@router.get("/models", summary="List models")
async def list_models(request: Request, identity: Annotated[Identity, Depends(needs("inference"))]) -> ModelList:
    """Every model, the base model first; each version of a plug-in by its id."""
    service = service_of(request)
    return ModelList(data=await service.backend.models(None if service.catalogue is None else identity.tenant))


@router.get("/models/{model_id:path}", summary="Retrieve a model")
async def get_model(
    request: Request, model_id: str, identity: Annotated[Identity, Depends(needs("inference"))]
) -> ModelCard:
    """One model, by its id or by the name under which the current version answers; anything else is a 404."""
    service = service_of(request)
    check_model(service, identity, model_id)
    return await service.backend.find_model(model_id)


@router.delete("/models/{model_id:path}", summary="Delete a fine-tuned model")
def delete_model(
    request: Request, model_id: str, identity: Annotated[Identity, Depends(needs("jobs"))]
) -> DeletedModel:
    """Take a plug-in of the asker's own out of service, at once and for good; what is stored of it goes later."""
    service = service_of(request)
    check_model(service, identity, model_id)
    if model_id == service.settings.model.name:
        raise ApiError(f"{model_id} is the base model, which is not yours to delete.", 403, "insufficient_permissions")
    if not parse_model_name(model_id).id:
        raise ApiError(f"{model_id} names whichever version is current; delete a version by its own id.", param="model")
    if service.store is None or service.catalogue is None:
        raise model_not_found(model_id)
    registry = Registry(service.store)
    try:
        registry.resolve(model_id)
        # The registry is no part of the database: a line before, which cannot be missing, and one after.
        service.catalogue.audit.write(noted(request, identity, "model.delete"), model_id, "begun")
        registry.withdraw(model_id)
    except NotFoundError:
        raise model_not_found(model_id) from None
    record(request, identity, "model.delete", model_id)
    return DeletedModel(id=model_id)

"""Gradient learning (ColA, arXiv 2404.13844): a frozen base model yields inputs and gradients at its sites, and each
customer's auxiliary model is fitted to them, here or on any other device.

The paper's loop, for one auxiliary:

    sites = find_sites(model, "*_proj")
    auxiliary = Auxiliary(sites, AuxiliaryConfig(rank=8))
    fitter = Fitter(auxiliary, lambda tensors: torch.optim.AdamW(tensors, lr=1e-3), FittingConfig(interval=2))
    with Taps(model, sites, Joint(auxiliary), device="cpu") as taps:
        for inputs in batches:
            with taps.batch(mask=inputs["attention_mask"]) as batch:
                model(**inputs).loss.backward()
            fitter.collect(batch.pairs()["joint"])
    fitter.flush()

For many customers in one pass, the mode is `Alone(auxiliaries)` or `Collaboration(auxiliaries)`, the batch says whose
its rows are (`taps.batch(rows, mask)`), the loss is `customers_loss(logits, labels, rows, mask)`, and the pairs of each
go to a fitter of its own (`for name, pairs in batch.pairs().items(): fitters[name].collect(pairs)`)."""

from ot_ray.cola.auxiliaries import Auxiliary, AuxiliaryConfig, tensor_shapes
from ot_ray.cola.codings import CODINGS
from ot_ray.cola.fits import FitConfig, Fits, Taken, make_fitter
from ot_ray.cola.fitting import Fitter, FittingConfig, gradients, surrogate
from ot_ray.cola.gradient_files import GradientFile, read_gradients, write_gradients
from ot_ray.cola.losses import customers_loss
from ot_ray.cola.merging import Merging, dequantize, weight_delta
from ot_ray.cola.modes import JOINT, Alone, Collaboration, Joint, Mode, PerCustomer
from ot_ray.cola.offload import Elsewhere, Measured, OffloadPlan, calibrate, plan_offload
from ot_ray.cola.pairs import Batch, Pair
from ot_ray.cola.passes import BasePass, CustomerRows, Passed
from ot_ray.cola.sites import Site, find_sites
from ot_ray.cola.states import pack_state, unpack_state
from ot_ray.cola.taps import Taps

__all__ = [
    "CODINGS",
    "JOINT",
    "Alone",
    "Auxiliary",
    "AuxiliaryConfig",
    "BasePass",
    "Batch",
    "Collaboration",
    "CustomerRows",
    "Elsewhere",
    "FitConfig",
    "Fits",
    "Fitter",
    "FittingConfig",
    "GradientFile",
    "Joint",
    "Measured",
    "Merging",
    "Mode",
    "OffloadPlan",
    "Pair",
    "Passed",
    "PerCustomer",
    "Site",
    "Taken",
    "Taps",
    "calibrate",
    "customers_loss",
    "dequantize",
    "find_sites",
    "gradients",
    "make_fitter",
    "pack_state",
    "plan_offload",
    "read_gradients",
    "surrogate",
    "tensor_shapes",
    "unpack_state",
    "weight_delta",
    "write_gradients",
]

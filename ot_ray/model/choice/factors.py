"""What an emulator layer with smaller maps starts from: factors of its attention, and channels of its MLP.

In the spirit of GradOT (2025): both keep what matters for the loss and for the gradient that passes through. Letters:
N tokens, I inputs and O outputs of a linear map, R rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ot_ray.errors import DataError, TrainingError
from ot_ray.model.choice.passes import first_rows, loss_of, undisturbed, with_labels
from ot_ray.model.emulator import EmulatorConfig
from ot_ray.model.families import Family, check_maps_are_called, family_of, layers_of
from ot_ray.model.packed.factored import attention_maps, channel_maps, factored_rank, kept_channels, sizes
from ot_ray.model.split import SplitPlan, depth_of

_DAMPING = 0.01


class LayerStatistics:
    """What passes through one layer's maps on the calibration data, and the gradient of the loss by it.

    `inputs[name]` [I, I] and `gradients[name]` [O, O], float64: second moments of what each map of the attention is
    given, and of the loss's gradient by what it returns: the two K-FAC factors of its Fisher matrix. `channels`
    [channels]: for each channel of the MLP the sum of ``(a g)²`` over tokens, what leaving it out does to the loss,
    to first order, squared.
    """

    def __init__(self, layer: nn.Module, family: Family) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.channels: Tensor | float = 0.0
        self.real: Tensor | None = None
        maps = [(name, self._of_map(name)) for name in attention_maps(layer, family)]
        self._handles = [layer.get_submodule(name).register_forward_hook(hook) for name, hook in maps]
        out = layer.get_submodule(family.mlp_out)
        self._handles.append(out.register_forward_hook(self._of_channels))

    @property
    def is_finite(self) -> bool:
        """Whether maps can be weighed by what was seen."""
        seen = (*self.inputs.values(), *self.gradients.values(), torch.as_tensor(self.channels))
        return all(bool(tensor.isfinite().all()) for tensor in seen)

    def close(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()

    def _rows(self, tensor: Tensor) -> Tensor:
        rows = tensor.detach().flatten(0, -2)
        return (rows if self.real is None else rows[self.real.flatten()]).double()

    def _of_map(self, name: str) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x_NI = self._rows(args[0])
            self.inputs[name] = self.inputs.get(name, 0.0) + x_NI.T @ x_NI

            def look_back(gradient: Tensor) -> None:
                g_NO = self._rows(gradient)
                self.gradients[name] = self.gradients.get(name, 0.0) + g_NO.T @ g_NO

            output.register_hook(look_back)

        return look

    def _of_channels(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        a_NC = self._rows(args[0])

        def look_back(gradient: Tensor) -> None:
            self.channels = self.channels + (a_NC * self._rows(gradient)).pow(2).sum(0)

        args[0].register_hook(look_back)


def smaller_layers(
    model: PreTrainedModel,
    plan: SplitPlan,
    kept: Sequence[int],
    config: EmulatorConfig,
    batches: Iterable[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Work out where an emulator with smaller maps starts.

    Costs a forward and a backward pass over `batches` for each layer that is kept, and memory for two matrices in
    float64 a map of one layer's attention.

    Args:
        model: the full model, whole and on one device; left as it was.
        kept: the layers of the middle that stay.
        batches: as for `choose_layers`.

    Returns:
        Every parameter of the emulator, named ``<layer of E>.<name>``, in the shapes of `with_smaller_maps`.

    Raises:
        DataError: there are no batches.
        TrainingError: an output or gradient is not finite, so that maps cannot be weighed.
        UnsupportedModelError: the architecture is set up to pass by its linear maps.
    """
    check_maps_are_called(model.config)
    family, middle = family_of(model), plan.middle(depth_of(model))
    rows = list(first_rows(batches, config.calibration, next(model.parameters()).device))
    if not rows:
        raise DataError("emulator.attention_rank and mlp_channels look at public text, but there is none")
    state = {}
    with undisturbed(model):
        rows = [with_labels(model, batch) for batch in rows]
        for place, i in enumerate(kept):
            layer = layers_of(model)[middle[i]]
            found = _statistics(model, layer, rows)
            if not found.is_finite:
                raise TrainingError(
                    f"layer {i} of the middle is not finite on the calibration data, so that its maps cannot be "
                    "factored; use model.dtype=float32, or leave emulator.attention_rank and mlp_channels out"
                )
            smaller = _smaller(layer, family, config, found)
            state |= {f"{place}.{name}": tensor for name, tensor in smaller.items()}
    return state


def _statistics(model: PreTrainedModel, layer: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> LayerStatistics:
    found = LayerStatistics(layer, family_of(model))
    # Gradients are wanted from here on and by nothing that is before.
    model.requires_grad_(False)
    start = layer.register_forward_pre_hook(_begin_gradients, with_kwargs=True)
    try:
        for batch in batches:
            found.real = batch.get("real")
            with torch.enable_grad():
                loss_of(model, batch).backward()
    finally:
        start.remove()
        found.close()
    return found


def _begin_gradients(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_(True)}


def _smaller(layer: nn.Module, family: Family, config: EmulatorConfig, found: LayerStatistics) -> dict[str, Tensor]:
    state = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    for name in attention_maps(layer, family):
        linear = layer.get_submodule(name)
        rank = factored_rank(*sizes(linear), config.attention_rank)
        if rank is not None:
            weight = state[f"{name}.weight"]
            if f"{name}.bias" in state:
                state[f"{name}.up.bias"] = state.pop(f"{name}.bias")
            up, down = weighted_factors(_rows_first(linear, weight), found.inputs[name], found.gradients[name], rank)
            state[f"{name}.up.weight"], state[f"{name}.weight"] = up.to(weight.dtype), down.to(weight.dtype)
    if config.mlp_channels is not None:
        assert isinstance(found.channels, Tensor)
        count = kept_channels(len(found.channels), config.mlp_channels)
        best = found.channels.topk(count).indices.sort().values
        for name in channel_maps(layer, family):
            state[f"{name}.weight"] = _rows_first(layer.get_submodule(name), state[f"{name}.weight"])[best].clone()
            if f"{name}.bias" in state:
                state[f"{name}.bias"] = state[f"{name}.bias"][best].clone()
        out = family.mlp_out
        state[f"{out}.weight"] = _rows_first(layer.get_submodule(out), state[f"{out}.weight"])[:, best].clone()
    return state


def weighted_factors(weight_OI: Tensor, inputs_II: Tensor, gradients_OO: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors nearest to a weight in the norm of its Fisher matrix, taken as K-FAC's Kronecker product.

    They minimise ``|G^(1/2) (W - U V) C^(1/2)|``, for C and G the second moments of the inputs and of the gradients by
    the outputs, each with a hundredth of its mean added to its diagonal: the singular values of ``G^(1/2) W C^(1/2)``.

    Returns:
        U [O, R] and V [R, I] in float64; of one share of the singular values each.
    """
    (c, c_inverse), (g, g_inverse) = _roots(inputs_II), _roots(gradients_OO)
    u, s, v = torch.linalg.svd(g @ weight_OI.double() @ c, full_matrices=False)
    share = s[:rank].sqrt()
    return g_inverse @ (u[:, :rank] * share), (share[:, None] * v[:rank]) @ c_inverse


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a damped second moment, scaled to a mean of 1, and its inverse."""
    mean = moment.diagonal().mean()
    scaled = moment / torch.where(mean > 0, mean, 1.0)
    values, vectors = torch.linalg.eigh(scaled)
    roots = (values.clamp_min(0) + _DAMPING).sqrt()
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T


def _rows_first(linear: nn.Module, weight: Tensor) -> Tensor:
    return weight.T if isinstance(linear, Conv1D) else weight

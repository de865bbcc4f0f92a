"""The loss of a batch whose rows belong to several customers. A model's own loss does for one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor
from torch.nn import functional as F

from ot_ray.errors import GradientLearningError

IGNORED = -100
"""The label of positions that are not learnt, as Transformers has it."""


def customers_loss(logits: Tensor, labels: Tensor, rows: Sequence[Hashable], mask: Tensor | None = None) -> Tensor:
    """The sum over customers of each one's mean cross-entropy, so that nobody's gradient depends on who else is there.

    Args:
        logits: [B, T, V].
        labels: int64 [B, T], those of the inputs themselves; they are shifted here. -100 is not learnt.
        rows: the customer of each of the B rows; rows of None are not learnt.
        mask: the batch's, [B, T]. Padding neither predicts (a row's first token, where it is padded on its left) nor
            is predicted, whatever its labels say.

    Returns:
        Scalar, float32 at least. A customer without a position to learn adds nothing.

    Raises:
        GradientLearningError: not one customer for each row.
    """
    if len(rows) != len(logits):
        raise GradientLearningError(
            f"rows name {len(rows)} customers, the batch has {len(logits)} rows; give one for each"
        )
    wanted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    if mask is not None:
        padding = mask == 0
        wanted = wanted.masked_fill(padding | F.pad(padding, (0, 1), value=True)[:, 1:], IGNORED)
    precise = logits if logits.itemsize >= 4 else logits.float()
    each = F.cross_entropy(precise.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    each = each.view(wanted.shape)
    learnt = (wanted != IGNORED).sum(dim=1)
    total = each.sum() * 0
    for customer in dict.fromkeys(rows):
        own = [row for row, name in enumerate(rows) if name == customer and name is not None]
        if own:
            total = total + each[own].sum() / learnt[own].sum().clamp(min=1)
    return total

from torch import Tensor, dtype

def convert_to_pairs(
    indices_tuple: tuple[Tensor, ...] | None, labels: Tensor, ref_labels: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def convert_to_weights(
    indices_tuple: tuple[Tensor, ...] | None,
    labels: Tensor,
    dtype: dtype,
    using_ref: bool = False,
) -> Tensor: ...
def get_matches_and_diffs(
    labels: Tensor, ref_labels: Tensor | None = None
) -> tuple[Tensor, Tensor]: ...

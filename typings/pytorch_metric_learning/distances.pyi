from torch import Tensor, nn

class BaseDistance(nn.Module):
    is_inverted: bool
    def __call__(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor: ...

class CosineSimilarity(BaseDistance): ...

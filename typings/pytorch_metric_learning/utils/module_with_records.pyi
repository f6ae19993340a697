from torch import nn

class ModuleWithRecords(nn.Module):
    collect_stats: bool
    def add_to_recordable_attributes(
        self,
        name: str | None = None,
        list_of_names: list[str] | None = None,
        is_stat: bool = False,
    ) -> None: ...
    def reset_stats(self) -> None: ...

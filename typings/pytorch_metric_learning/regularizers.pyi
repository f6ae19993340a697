from typing import Any

from .utils.module_with_records import ModuleWithRecords

class BaseRegularizer(ModuleWithRecords):
    def __init__(self, **kwargs: Any) -> None: ...

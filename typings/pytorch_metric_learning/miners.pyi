from typing import Any

from .distances import BaseDistance
from .utils.module_with_records import ModuleWithRecords

class BaseMiner(ModuleWithRecords):
    distance: BaseDistance
    def __init__(self, **kwargs: Any) -> None: ...

"""Recent metric-learning methods as components for pytorch-metric-learning.

Import the sub-packages as you would PML's own: ``from pml_extras import losses, miners``.
"""

__version__ = "0.1.0"

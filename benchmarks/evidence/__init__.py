"""Do the methods do what their papers claim? Run `run.py`, then `render.py`."""

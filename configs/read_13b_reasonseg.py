"""READ-13B on ReasonSeg, from SESAME-13B.

Expected (the paper's main results): ReasonSeg test gIoU 62.2, cIoU 62.8.

Start: SESAME-13B converted to models/sesame-13b. The points are the 13B's: 60 of them from the full grid.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_reasonseg")
    config.start.model = "models/sesame-13b"
    config.start.sasp = "13b"
    return config

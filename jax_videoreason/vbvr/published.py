"""Scores that others published, as they printed them: to stand beside ours, never to be mixed.

Source: "A Very Big Video Reasoning Suite", arXiv 2602.20159 v2, table 3; the last two rows of
`BENCH` from reviews of later versions, which give the overall score alone. The scorers changed
between March and April 2026, after that table, so the EvalKit of today may not reproduce it.
"""

from jax_videoreason.vbvr.suite import FACULTIES

Scores = dict[str, float]

COLUMNS = (
  "overall",
  "in-domain",
  *(f"in-domain {name}" for name in FACULTIES),
  "out-of-domain",
  *(f"out-of-domain {name}" for name in FACULTIES),
)

_TABLE = """
Human | .974 .960 .919 .956 1.00 .95 1.00 .988 1.00 1.00 .990 1.00 .970
VBVR-Wan2.2 | .685 .760 .724 .750 .782 .745 .833 .610 .768 .572 .547 .618 .615
Sora 2 | .546 .569 .602 .477 .581 .572 .597 .523 .546 .472 .525 .462 .546
Veo 3.1 | .480 .531 .611 .503 .520 .444 .510 .429 .577 .277 .420 .441 .404
Runway Gen-4 Turbo | .403 .392 .396 .409 .429 .341 .363 .414 .515 .429 .419 .327 .373
Wan2.2-I2V-A14B | .371 .412 .430 .382 .415 .404 .419 .329 .405 .308 .343 .236 .307
Kling 2.6 | .369 .408 .465 .323 .375 .347 .519 .330 .528 .135 .272 .356 .359
LTX-2 | .313 .329 .316 .362 .326 .340 .306 .297 .244 .337 .317 .231 .311
CogVideoX1.5-5B-I2V | .273 .283 .241 .328 .257 .328 .305 .262 .281 .235 .250 .254 .282
HunyuanVideo-I2V | .273 .280 .207 .357 .293 .280 .316 .265 .175 .369 .290 .253 .250
VBVR-Wan2.2 + ensemble (later) | .716
VBVR-LTX2.3 (later) | .516
"""


def _rows(table: str) -> dict[str, Scores]:
  rows = {}
  for line in table.strip().splitlines():
    name, _, numbers = line.partition(" | ")
    values = [float(number) for number in numbers.split()]
    rows[name] = dict(zip(COLUMNS, values, strict=False))
  return rows


BENCH = _rows(_TABLE)

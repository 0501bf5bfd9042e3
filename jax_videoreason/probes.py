"""Linear probes: all of them at once, judged on cases that they have not seen, or to steer by."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_videoreason import stats
from jax_videoreason.axes import Array

STEPS, RATE = 150, 0.03
FOLDS, RIDGE = 4, 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probes:
  """M probes in the units of their features: x @ kernel + bias is what a sample x (K) scores.

  kernel: M K C. bias: M C. classes: the C labels. A probe names the class of the largest score.
  """

  kernel: np.ndarray
  bias: np.ndarray
  classes: np.ndarray

  def direction(self, label: object) -> np.ndarray:
    """M K, towards a class: its kernel minus the mean of all.

    A sample moved by gain * direction scores gain * |direction|^2 more for it, beside the mean of
    all scores. ValueError for a label that is no class.
    """
    place = np.flatnonzero(self.classes == label)
    if not len(place):
      raise ValueError(f"label {label!r} is no class, wanted one of {self.classes.tolist()}.")
    return self.kernel[:, :, place[0]] - self.kernel.mean(2)


def fit(features: np.ndarray, labels: np.ndarray, *, ridge: float = RIDGE) -> Probes:
  """The probes of `crossed`, trained on all samples. features: M N K; labels: N classes.

  With the layers as M and means of tokens (tap `region_mean`) as samples, `direction(label)` is the
  L D that `interventions.steer` takes; one row of it is a direction of the tap `project`. How well
  they read what they never saw is what `crossed` says.

  ValueError for one class only.
  """
  known, classes = _classes(labels)
  x = _spread(np.asarray(features, np.float32))
  everything = jnp.ones((1, len(classes)), bool)
  _, kernel, bias = _train(x, jnp.asarray(classes), everything, len(known), ridge)
  return Probes(
    kernel=np.asarray(rearrange(kernel, "m 1 k c -> m k c")),
    bias=np.asarray(rearrange(bias, "m 1 1 c -> m c")),
    classes=known,
  )


def crossed(
  features: np.ndarray,
  labels: np.ndarray,
  groups: np.ndarray,
  *,
  folds: int = FOLDS,
  ridge: float = RIDGE,
) -> np.ndarray:
  """M N bool: is the class of each sample named right by a probe that never saw its group?

  features: M N K, M probes (layers and steps) over the same N samples. labels: N classes. groups: N
  int, such as the case: a group is never split between training and test, and every fold has its
  share of each class, by the first sample of a group. Each probe is a softmax of a linear map on
  standardised features, trained by Adam on its weights' squares times `ridge` beside the
  cross-entropy. All M probes of all folds train in one call, spread over the devices.

  ValueError for one class only, or fewer groups than folds.
  """
  known, classes = _classes(labels)
  groups = np.unique(groups, return_inverse=True)[1]
  if groups.max() + 1 < folds:
    raise ValueError(f"{groups.max() + 1} groups for {folds} folds: give more cases.")
  fold = _fold_of(classes, groups, folds)
  train = np.stack([fold != f for f in range(folds)])
  x = _spread(np.asarray(features, np.float32))
  said, *_ = _train(x, jnp.asarray(classes), jnp.asarray(train), len(known), ridge)
  right = rearrange(np.asarray(said), "m f n -> f m n") == classes[None, None]
  return np.asarray((right & ~train[:, None]).any(0))


def beside_shuffled(
  features: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, seed: int = 0
) -> np.ndarray | None:
  """2 M N: `crossed` with the labels, and with the same labels shuffled; 0 or 1, NaN without label.

  labels: N texts, "" = the sample has none. None where the labelled samples are of one class, or of
  fewer groups than folds or than an interval needs.
  """
  mine = np.flatnonzero(labels != "")
  few = len(np.unique(groups[mine])) < max(FOLDS, stats.LEAST)
  if few or len(np.unique(labels[mine])) < 2:
    return None
  turned = labels[mine][np.random.default_rng(seed).permutation(len(mine))]
  found = np.full((2, *np.shape(features)[:2]), np.nan)
  for row, label in enumerate((labels[mine], turned)):
    found[row][:, mine] = crossed(features[:, mine], label, groups[mine])
  return found


def _classes(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(the C labels there are, N: the number of each sample's); ValueError where there is but one."""
  known, classes = np.unique(labels, return_inverse=True)
  if len(known) < 2:
    raise ValueError(f"all {len(labels)} labels are equal: a probe needs two classes or more.")
  return known, classes


def _fold_of(classes: np.ndarray, groups: np.ndarray, folds: int) -> np.ndarray:
  """N: the fold of each sample, the same in every call. groups: N, from 0 on.

  Groups are dealt out class by class (that of their first sample), at random within a class. What
  is commoner in a fold would be rarer in training, and probes of noise be right less often than
  those of shuffled labels, wherever labels follow the order of the groups.
  """
  first = np.unique(groups, return_index=True)[1]
  order = np.lexsort((np.random.default_rng(0).permutation(len(first)), classes[first]))
  return (np.argsort(order) % folds)[groups]


def _spread(x: np.ndarray) -> Array:
  """M N K with M over all devices, where it divides."""
  devices = jax.devices()
  if len(devices) == 1 or len(x) % len(devices):
    return jnp.asarray(x)
  mesh = Mesh(np.array(devices), ("probe",))
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec("probe")))


@functools.partial(jax.jit, static_argnums=3)
def _train(
  x: Array, classes: Array, train: Array, count: int, ridge: float
) -> tuple[Array, Array, Array]:
  """M folds N, the class that each probe names; M folds K C and M folds 1 C, its kernel and bias.

  The last two are in the units of x.
  """
  target = jax.nn.one_hot(classes, count)
  optimiser = optax.adam(RATE)

  def one(x: Array, use: Array) -> tuple[Array, Array, Array]:
    weight = rearrange(use.astype(x.dtype) / use.sum(), "n -> n 1")
    mean = (weight * x).sum(0, keepdims=True)
    spread = jnp.sqrt((weight * (x - mean) ** 2).sum(0, keepdims=True))
    spread = jnp.where(spread > 1e-6, spread, 1.0)
    x = (x - mean) / spread
    params = {"kernel": jnp.zeros((x.shape[1], count)), "bias": jnp.zeros((1, count))}

    def loss(params: dict[str, Array]) -> Array:
      logits = x @ params["kernel"] + params["bias"]
      entropy = -(target * jax.nn.log_softmax(logits)).sum(1, keepdims=True)
      return (weight * entropy).sum() + ridge * (params["kernel"] ** 2).sum()

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
      params, state = carry
      updates, state = optimiser.update(jax.grad(loss)(params), state)
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), length=STEPS)
    said = (x @ params["kernel"] + params["bias"]).argmax(1)
    kernel = params["kernel"] / rearrange(spread, "1 k -> k 1")
    offset = (rearrange(mean, "1 k -> k 1") * kernel).sum(0, keepdims=True)
    return said, kernel, params["bias"] - offset

  over_folds = jax.vmap(one, (None, 0))
  return jax.vmap(over_folds, (0, None))(x, train)

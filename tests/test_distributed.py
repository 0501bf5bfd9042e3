"""Which processes belong together, as the environment says it."""

import pytest

from jax_videoreason import distributed

ALL = {
  "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "2",
}


def test_one_process_needs_nothing():
  assert distributed.wanted({}) is None
  assert distributed.wanted({"TPU_WORKER_HOSTNAMES": "localhost", "SLURM_NTASKS": "1"}) is None
  assert distributed.wanted({**ALL, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
  distributed.meet("anywhere")


def test_the_three_names_say_it_all():
  assert distributed.wanted(ALL) == {
    "coordinator_address": "10.0.0.1:1234",
    "num_processes": 4,
    "process_id": 2,
  }


@pytest.mark.parametrize(
  "environment", [{"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, {"SLURM_NTASKS": "2"}]
)
def test_jax_finds_them_on_cloud_tpu_and_slurm(environment):
  assert distributed.wanted(environment) == {}


@pytest.mark.parametrize("name", ALL)
def test_a_missing_name_is_told(name):
  with pytest.raises(ValueError, match=f"and {name} is not: set all three, or none"):
    distributed.wanted({key: value for key, value in ALL.items() if key != name})


def test_numbers_that_contradict_each_other_are_refused():
  with pytest.raises(ValueError, match="JAX_PROCESS_ID=4, wanted whole numbers, the second below"):
    distributed.wanted({**ALL, "JAX_PROCESS_ID": "4"})

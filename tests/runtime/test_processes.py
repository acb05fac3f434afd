"""Which processes a run has: by flags, by SLURM, or this one alone."""

import pytest

from d2dpm_jax.runtime import processes

_SLURM = {
  'SLURM_JOB_ID': '4097',
  'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_STEP_NODELIST': 'gpu[007-010],other3',
  'SLURM_STEP_TASKS_PER_NODE': '1(x4)',
  'SLURM_PROCID': '2',
  'SLURM_LOCALID': '0',
}


def _cluster(*flags, **environment):
  return processes.cluster(*(flags or (None,) * 3), environment)


def test_a_laptop_is_alone():
  assert _cluster() is None
  assert (processes.index(), processes.count()) == (0, 1)
  assert processes.is_first()
  assert processes.own([1, 2, 3]) == [1, 2, 3]
  processes.wait_for_all('nobody')
  assert processes.from_first('nobody', lambda: [1]) == [1]
  processes.initialize()  # Waits for nobody.
  processes.leave(3)  # Nor ends anything.


def test_flags_name_the_others():
  found = _cluster('host:1234', 3, 2, **_SLURM)
  assert found == ('host:1234', 3, 2, None)


@pytest.mark.parametrize(
  ('flags', 'text'),
  [
    (('host:1', None, None), '--num_processes and --process_id: not given'),
    ((None, 2, 0), '--coordinator_address: not given'),
    (('host:1', 2, 2), r'--process_id is 2; expected 0..1'),
    (('host:1', 2, -1), '--process_id is -1'),
    (('host', 2, 1), "--coordinator_address 'host': expected host:port"),
  ],
)
def test_wrong_flags(flags, text):
  with pytest.raises(ValueError, match=text):
    _cluster(*flags)


@pytest.mark.parametrize(
  ('nodes', 'host'),
  [
    ('gpu[007-010],other3', 'gpu007'),
    ('gpu[3,7]', 'gpu3'),
    ('a1,b2', 'a1'),
    ('a1.example.org', 'a1.example.org'),
  ],
)
def test_slurm_tells_who_is_there(nodes, host):
  found = _cluster(**{**_SLURM, 'SLURM_STEP_NODELIST': nodes})
  assert found == (f'{host}:61441', 4, 2, None)


@pytest.mark.parametrize(
  ('visible', 'tasks', 'ids'),
  [
    ('0,1,2,3', '1(x4)', None),  # A task a host has them all.
    ('0,1,2,3', '4', (3,)),  # Tasks that see the same GPUs share them out.
    ('0', '4', None),  # SLURM gave each task its own.
  ],
)
def test_slurm_tasks_use_every_gpu_once(visible, tasks, ids):
  environment = {
    **_SLURM,
    'CUDA_VISIBLE_DEVICES': visible,
    'SLURM_STEP_TASKS_PER_NODE': tasks,
    'SLURM_LOCALID': '3',
  }
  assert _cluster(**environment).local_device_ids == ids


def test_one_task_of_slurm_is_alone():
  assert _cluster(**{**_SLURM, 'SLURM_STEP_NUM_TASKS': '1'}) is None
  outside_srun = {k: v for k, v in _SLURM.items() if 'STEP' not in k}
  assert _cluster(**outside_srun) is None


def test_mpirun_is_told_which_flags_to_give():
  assert _cluster(OMPI_COMM_WORLD_SIZE='1') is None
  with pytest.raises(ValueError, match='OMPI_COMM_WORLD_RANK'):
    _cluster(OMPI_COMM_WORLD_SIZE='2')


def test_hosts_of_a_tpu_pod():
  assert processes.on_tpu_pod({'TPU_WORKER_HOSTNAMES': 'a,b'})
  assert not processes.on_tpu_pod({'TPU_WORKER_HOSTNAMES': 'localhost'})
  # There, too, a process that computes on its own CPU waits for nobody.
  cpu = {'TPU_WORKER_HOSTNAMES': 'a,b', 'JAX_PLATFORMS': 'cpu'}
  assert not processes.on_tpu_pod(cpu)

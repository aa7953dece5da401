"""Train one run on several devices, then score it as `nbs/runs/train.ipynb` does.

    accelerate launch --multi_gpu --num_processes 4 nbs/runs/train_together.py --experiment lts --preset gpu

Without GPUs, where it is slower than one process and good for tests alone:

    torchrun --nproc-per-node 2 nbs/runs/train_together.py --experiment lts --preset smoke

Every process trains. When training has ended, the first one executes the run's notebook into the run's folder: the
notebook finds the finished checkpoint, scores it and writes `result.json`.
"""
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # DDP's warning that it found no parameter without gradient

import typer

from lts_nb.errors import KitError

HERE = Path(__file__).resolve().parent
# what a launcher tells its processes, and what a notebook that runs alone must not read
LAUNCHERS = 'ACCELERATE_', 'TORCHELASTIC_', 'TORCH_NCCL_', 'MASTER_', 'GROUP_', 'ROLE_'


def leave_the_group():
    "Take the launcher's settings out of the environment that the notebook will have."
    from lts_nb.training.distributed import PLACE
    for name in list(os.environ):
        if name in PLACE or name.startswith(LAUNCHERS): del os.environ[name]


def wait_for(folder, hashes, timeout):
    "Return when the first process has looked at the checkpoint, so that all of them find the same."
    from lts_nb.evidence.experiments import begun_with, other_code
    ends = time.monotonic() + timeout
    while other_code(begun_with(folder), hashes):
        if time.monotonic() > ends: raise KitError('the first process did not begin', folder, 'Start all processes again')
        time.sleep(.1)


def train_and_score(config, options, root, out, timeout):
    "What one process does; only the first does more than train."
    from lts_nb.evidence.experiments import run_hashes, set_aside_other_code
    from lts_nb.training.distributed import train_member
    # without a launcher there is no rank, and `train_member` says so
    rank = os.environ.get('RANK')
    first = rank == '0'
    folder, hashes = out/'runs'/config.run, run_hashes(config)
    if first: set_aside_other_code(folder, hashes)
    elif rank: wait_for(folder, hashes, timeout)
    train_member(config, root, out, timeout)
    if not first: return
    leave_the_group()
    import papermill
    papermill.execute_notebook(HERE/'train.ipynb', out/'runs'/config.run/'train.ipynb', cwd=HERE, kernel_name='python3',
                               parameters=options | dict(out=str(out), root=str(root)), progress_bar=False)
    print(f'The result: {out/"runs"/config.run/"result.json"}')


def main(
    experiment:Annotated[str, typer.Option(help='A name from nbs/evidence/02_experiments.ipynb.')] = 'lts',
    dataset:Annotated[str, typer.Option(help="The paper's name or ours.")] = 'refcoco',
    preset:Annotated[str, typer.Option(help='smoke, cpu, gpu or paper.')] = 'smoke',
    seed:Annotated[int, typer.Option(help='Of everything that is drawn.')] = 0,
    pretrain:Annotated[bool, typer.Option('--pretrain', help='Make the backbone here, even where the kit ships one.')] = False,
    out:Annotated[Optional[Path], typer.Option(help="The report's folder; out/<preset> in the clone where not given.")] = None,
    root:Annotated[Optional[Path], typer.Option(help="The data's folder; below data/ in the clone where not given.")] = None,
    timeout:Annotated[float, typer.Option(min=1, help='Seconds that a process waits for another.')] = 300.,
):
    "One of the processes of a run."
    from lts_nb.evidence.experiments import run_config
    from lts_nb.manual.batch import default_out, default_root
    options = dict(experiment=experiment, dataset=dataset, preset=preset, seed=seed, pretrain=pretrain)
    out, root = Path(out or default_out(preset)).resolve(), Path(root or default_root(preset)).resolve()
    try: train_and_score(run_config(**options), options, root, out, timeout)
    except KitError as e:
        print(f'train_together: {e}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted; the same command goes on where it stopped.', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__': typer.run(main)

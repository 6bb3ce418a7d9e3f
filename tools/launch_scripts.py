"""Write the scripts in launch/slurm, which are what ``evomesh slurm`` writes for common jobs."""

from __future__ import annotations

from pathlib import Path

from evomesh.cluster.slurm import SlurmJob, Sweep

FOLDER = Path(__file__).parents[1] / "launch/slurm"
CONFIG = "configs/7B_sft.py"
SWEEP = Sweep("adam.lr", ("1e-5", "2e-5", "4e-5"), "local:sweep")
JOBS = {
    "single_node.sh": SlurmJob(CONFIG),
    "many_nodes.sh": SlurmJob(CONFIG, nodes=2),
    "many_nodes_torchrun.sh": SlurmJob(CONFIG, nodes=2, starter="torchrun"),
    "sweep.sh": SlurmJob(CONFIG, name="sweep", sweep=SWEEP),
}


def main() -> None:
    """Write all of them."""
    for name, job in JOBS.items():
        (FOLDER / name).write_text(job.script(), encoding="utf-8")


if __name__ == "__main__":
    main()

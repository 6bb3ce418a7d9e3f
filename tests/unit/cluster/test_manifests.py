"""The YAML files in launch/: valid by Kubernetes' and Kubeflow's own models, and in agreement with themselves.

The models are those of the package kubeflow-trainer-api, generated from the projects' OpenAPI documents. They drop
unknown keys, so that a file is valid if it comes out of them as it went in.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models
from pydantic import BaseModel, ConfigDict, ValidationError

from evomesh.train.launchers import torchrun_command

LAUNCH = Path(__file__).parents[3] / "launch"
KINDS = {
    "Service": models.IoK8sApiCoreV1Service,
    "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
    "Job": models.IoK8sApiBatchV1Job,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}


def documents(name: str) -> dict[str, Any]:
    """Kind -> document."""
    found = list(yaml.safe_load_all((LAUNCH / name).read_text()))
    return {document["kind"]: document for document in found}


@pytest.mark.parametrize("name", ["kubernetes/job.yaml", "kubernetes/trainjob.yaml"])
def test_valid_by_the_projects_models(name: str) -> None:
    for kind, document in documents(name).items():
        assert KINDS[kind].from_dict(document).to_dict() == document


def test_an_unknown_key_and_a_wrong_type_are_seen() -> None:
    job = documents("kubernetes/job.yaml")["Job"]
    job["spec"]["template"]["spec"]["restartPolcy"] = "Never"
    assert models.IoK8sApiBatchV1Job.from_dict(job).to_dict() != job
    job["spec"]["completions"] = "2"
    with pytest.raises(ValidationError):
        models.IoK8sApiBatchV1Job.from_dict(job)


def test_the_pods_of_the_job_find_each_other() -> None:
    found = documents("kubernetes/job.yaml")
    job, service, claim = found["Job"], found["Service"], found["PersistentVolumeClaim"]
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    env = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == env["NPROC_PER_NODE"]
    nodes = int(env["NNODES"])
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == nodes
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    command = torchrun_command(env, container["command"])
    assert command is not None
    assert command[3:] == [
        f"--nnodes={nodes}",
        "--node_rank=1",
        f"--master_addr={first}",
        "--master_port=29500",
        "--nproc_per_node=8",
        *container["command"],
    ]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == mounted
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"] == {
        "claimName": claim["metadata"]["name"]
    }


def test_no_pod_is_made_anew_after_a_users_mistake() -> None:
    job = documents("kubernetes/job.yaml")["Job"]["spec"]
    runtime = documents("kubernetes/trainjob.yaml")["TrainingRuntime"]["spec"]
    (node,) = runtime["template"]["spec"]["replicatedJobs"]
    for spec in (job, node["template"]["spec"]):
        (container,) = spec["template"]["spec"]["containers"]
        rule = spec["podFailurePolicy"]["rules"][-1]
        assert rule["action"] == "FailJob"
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert set(rule["onExitCodes"]["values"]) == {1, 2, 6}


def run(
    command: str, folder: Path, stub: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a shell command in which ``evomesh`` is a stub."""
    (folder / "evomesh").write_text(f"#!/bin/bash\n{stub}")
    (folder / "evomesh").chmod(0o755)
    path = f"{folder}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-c", command],
        env=env | {"PATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_train_job_passes_on_what_kubeflow_sets(tmp_path: Path) -> None:
    trainer = documents("kubernetes/trainjob.yaml")["TrainJob"]["spec"]["trainer"]
    pet = {
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "node-0-0",
        "MASTER_PORT": "29400",
    }
    variables = {f"PET_{name}": value for name, value in pet.items()}
    done = run(trainer["args"][0], tmp_path, 'env; echo "args=$*"', **variables)
    env = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert env["args"] == "train configs/7B_sft.py"
    command = torchrun_command(env, [])
    assert command is not None
    assert command[3:] == [
        "--nnodes=2", "--node_rank=1", "--master_addr=node-0-0", "--master_port=29400", "--nproc_per_node=8"
    ]  # fmt: skip
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"


class Strict(BaseModel):
    """A model that takes no other keys. Aliyun publishes none that could be used without its whole SDK."""

    model_config = ConfigDict(extra="forbid", strict=True)


class DlcResources(Strict):
    """Names and types as in the reference of CreateJob, and so below."""

    CPU: str
    GPU: str
    Memory: str
    SharedMemory: str


class DlcSpec(Strict):
    Type: str
    Image: str
    PodCount: int
    ResourceConfig: DlcResources


class DlcData(Strict):
    DataSourceId: str
    MountPath: str


class DlcSettings(Strict):
    TerminationGracePeriodSeconds: int


class DlcJob(Strict):
    DisplayName: str
    JobType: str
    WorkspaceId: str
    ResourceId: str
    JobSpecs: list[DlcSpec]
    DataSources: list[DlcData]
    Envs: dict[str, str]
    Settings: DlcSettings
    UserCommand: str


@pytest.mark.parametrize(
    ("codes", "attempts", "code"), [("0", 1, 0), ("75 75 0", 3, 0), ("75 2", 2, 2)]
)
def test_dlc(tmp_path: Path, codes: str, attempts: int, code: int) -> None:
    job = DlcJob(**yaml.safe_load((LAUNCH / "aliyun_dlc/job.yaml").read_text()))
    assert [spec.Type for spec in job.JobSpecs] == ["Master", "Worker"]
    stub = f'echo >> calls; codes=({codes}); exit "${{codes[$(wc -l < calls) - 1]}}"'
    done = run(job.UserCommand.replace("cd /work", ""), tmp_path, stub)
    assert done.returncode == code, done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == attempts

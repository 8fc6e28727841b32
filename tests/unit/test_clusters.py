"""The files of clusters/ are accepted by the tools that read them; its page is true of them."""

import os
import re
import shlex
import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import typer.main
import yaml
from packaging.requirements import Requirement

from cacp_ray.cli import app
from cacp_ray.cli.searching import _read_settings

CLUSTERS = Path("clusters")
CLOUDS = ("aws", "gcp", "azure")
LAUNCHER = (*CLOUDS, "onprem")
README = (CLUSTERS / "README.md").read_text()
KUBERAY = sorted((CLUSTERS / "kuberay").glob("*.yaml"))

# Fields of KubeRay's custom resources, version 1.6, as its API reference lists them; a star marks
# those that must be there. Pod templates are Kubernetes' own: the fields of them that we use.
CLUSTER_SPEC = """headGroupSpec* workerGroupSpecs rayVersion enableInTreeAutoscaling
    autoscalerOptions headServiceAnnotations suspend managedBy gcsFaultToleranceOptions
    authOptions upgradeStrategy"""
JOB_SPEC = """entrypoint runtimeEnvYAML jobId submissionMode entrypointNumCpus entrypointNumGpus
    entrypointResources shutdownAfterJobFinishes ttlSecondsAfterFinished activeDeadlineSeconds
    backoffLimit rayClusterSpec clusterSelector submitterPodTemplate submitterConfig metadata
    suspend managedBy deletionStrategy preRunningDeadlineSeconds"""
AUTOSCALER = """version upscalingMode idleTimeoutSeconds image imagePullPolicy env envFrom resources
    securityContext volumeMounts"""
HEAD = "template* rayStartParams serviceType headService enableIngress resources labels"
WORKERS = """groupName* minReplicas* maxReplicas* template* replicas rayStartParams numOfHosts
    suspend scaleStrategy idleTimeoutSeconds resources labels"""
POD = """affinity containers* restartPolicy nodeSelector tolerations serviceAccountName volumes
    terminationGracePeriodSeconds"""
RAY_DRAINS_SECONDS = 30  # after SIGTERM; as long as Kubernetes' own default grace
CONTAINER = "name* image* resources ports env volumeMounts"


def check(value, fields, where):
    names = {field.rstrip("*"): field.endswith("*") for field in fields.split()}
    assert set(value) <= set(names), where
    assert {name for name, is_needed in names.items() if is_needed} <= set(value), where


def check_pod(template, where):
    check(template, "metadata spec*", where)
    check(template["spec"], POD, where)
    for container in template["spec"]["containers"]:
        check(container, CONTAINER, where)
        resources = container["resources"]
        assert set(resources) == {"limits", "requests"}
        assert all(isinstance(v, str) for part in resources.values() for v in part.values())
        assert resources["limits"] == resources["requests"]


def check_cluster(spec, where):
    check(spec, CLUSTER_SPEC, where)
    check(spec["autoscalerOptions"], AUTOSCALER, where)
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert isinstance(spec["autoscalerOptions"]["idleTimeoutSeconds"], int)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["authOptions"] == {"mode": "token"}
    check(spec["headGroupSpec"], HEAD, where)
    check_pod(spec["headGroupSpec"]["template"], where)
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in spec["workerGroupSpecs"]:
        check(group, WORKERS, where)
        check_pod(group["template"], where)
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace > RAY_DRAINS_SECONDS
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        assert group["rayStartParams"] == {}


@pytest.fixture(params=LAUNCHER)
def launcher(request):
    """Name and content of a file of Ray's cluster launcher."""
    return request.param, yaml.safe_load((CLUSTERS / f"{request.param}.yaml").read_text())


def test_ray_s_own_schema_accepts_the_launcher_files(launcher):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(launcher[1])
    validate_config(prepared)
    with pytest.raises(Exception, match="head_nodes"):
        validate_config(prepared | {"head_nodes": {}})  # as it would be in a typing error


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_have_a_stable_head_without_evaluators_and_spot_workers_from_zero(name):
    config = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    spot = re.compile("spot|preemptible", re.IGNORECASE)
    assert head["resources"] == {"CPU": 0}
    assert not spot.search(str(head))
    assert len([kind for kind in types.values() if "GPU" not in kind["resources"]]) >= 2
    assert any("GPU" in kind["resources"] for kind in types.values())
    for kind in types.values():
        assert kind["min_workers"] == 0 < kind["max_workers"] <= config["max_workers"]
        assert spot.search(str(kind["node_config"]))
    assert 0 < config["idle_timeout_minutes"] <= 10


def test_every_node_asks_for_the_token_and_none_shows_the_dashboard(launcher):
    _, config = launcher
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [line for line in starts if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"0\.0\.0\.0|IpPermissions", str(config))
    for line in starts:
        parse(line.replace("$RAY_HEAD_IP", "10.0.0.5"))


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_files_have_the_fields_of_its_resources(path):
    resource = yaml.safe_load(path.read_text())
    check(resource, "apiVersion* kind* metadata* spec*", path)
    assert resource["apiVersion"] == "ray.io/v1"
    spec = resource["spec"]
    if resource["kind"] == "RayJob":
        check(spec, JOB_SPEC, path)
        assert spec["shutdownAfterJobFinishes"] is True
        assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"], dict)
        parse(spec["entrypoint"])
        spec = spec["rayClusterSpec"]
    else:
        assert resource["kind"] == "RayCluster"
    check_cluster(spec, path)


def test_both_kinds_of_kuberay_files_are_there():
    assert {yaml.safe_load(path.read_text())["kind"] for path in KUBERAY} == {
        "RayCluster",
        "RayJob",
    }


def test_all_files_name_one_ray_that_the_package_allows():
    files = [path for path in CLUSTERS.rglob("*") if path.is_file()]
    text = "\n".join(path.read_text() for path in files)
    versions = set(re.findall(r"(?:ray|cacp-ray):(\d+\.\d+\.\d+)-py311-[cg]pu", text))
    versions |= set(re.findall(r'rayVersion: "(.*)"', text))
    assert len(versions) == 1
    project = Path("pyproject.toml").read_text()
    wanted = Requirement(re.search(r'"(ray\[.*)"', project)[1])
    assert wanted.specifier.contains(versions.pop())


def test_the_image_is_built_from_what_is_there():
    lines = (CLUSTERS / "Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {step for step, _ in steps} <= {"ARG", "FROM", "COPY", "RUN", "ENV", "WORKDIR"}
    assert [step for step, _ in steps][:2] == ["ARG", "FROM"]
    assert ["COPY", "--chown=ray:users . /home/ray/cacp_ray"] in steps
    ignored = (CLUSTERS / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


def parse(line):
    """Reads a command as the tool does, and what is inside of it; other tools' are left alone."""
    words = shlex.split(line.split(" > ")[0].split(";")[-1])
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    tool, name, *arguments = words
    if tool == "ray":
        from ray.scripts.scripts import cli

        command = cli.commands[name]
        if name == "job":
            name, *arguments = arguments
            command = command.commands[name]
        context = command.make_context(name, list(arguments))
        if name == "exec":
            parse(context.params["cmd"])
        if name == "submit":
            parse(shlex.join(context.params["entrypoint"]))
        if "cluster_config_file" in context.params:
            assert Path(context.params["cluster_config_file"]).exists()
        return True
    if tool == "cacp-ray":
        command = typer.main.get_command(app).commands[name]
        options = command.make_context(name, arguments).params
        words = [re.sub(r"^(/home/ray/)?cacp_ray/", "", word) for word in options["settings"]]
        assert Path(words[0]).exists()
        _read_settings(words, options["overrides"])
        return True
    return False


COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_parses(line):
    is_ours = parse(line)
    assert is_ours or line.split()[0] in ("docker", "kubectl", "sky")


SKY = yaml.safe_load((CLUSTERS / "sky.yaml").read_text())


def test_skypilot_s_own_schema_accepts_its_file_and_its_parser_the_command():
    """Only where SkyPilot is installed, which has an environment of its own in most places."""
    sky = pytest.importorskip("sky")
    from sky.client.cli import command

    given = SKY | {"secrets": {"RAY_AUTH_TOKEN": "x"}}
    task = sky.Task.from_yaml_config(deepcopy(given))
    assert task.num_nodes == 4
    assert all(kind.use_spot for kind in task.resources)
    with pytest.raises(Exception, match="num_nodes"):
        sky.Task.from_yaml_config(deepcopy(given) | {"num_node": 2})
    (line,) = (line for line in COMMANDS if line.startswith("sky jobs launch"))
    launch = command.cli.commands["jobs"].commands["launch"]
    words = shlex.split(re.sub(r"\$\(.*?\)", "x", line))
    launch.make_context("launch", words[3:])


def test_nodes_of_skypilot_ask_for_the_token_and_run_the_whole_job():
    lines = [line.strip() for line in SKY["run"].splitlines()]
    assert lines[0] == "export RAY_AUTH_MODE=token"
    assert SKY["secrets"] == {"RAY_AUTH_TOKEN": None}  # given by hand, never written down
    starts = [line for line in lines if line.startswith("ray start")]
    assert len(starts) == 2
    assert all("--block" in line for line in starts)
    for line in (*starts, *(line for line in lines if line.startswith("cacp-ray"))):
        parse(re.sub(r"( &| \|\| .*)$", "", line).replace("$head", "10.0.0.5:6479"))
    (job,) = (line for line in lines if line.startswith("cacp-ray run"))
    assert "--resume" in job
    assert '--storage "$STORAGE"' in job


@pytest.mark.parametrize(("search_ends_with", "code"), [(0, 0), (3, 3)])
def test_the_script_of_skypilot_ends_all_nodes_with_the_code_of_the_job(
    search_ends_with, code, tmp_path
):
    """Run by bash as SkyPilot does, with programs in the place of ray and cacp-ray."""
    head = tmp_path / "head"
    programs = {
        "ray": f"""case "$*" in
  status*) test -e {head} ;;
  *--head*) touch {head}; exec sleep 60 ;;
  *) touch {head}.joined; while test -e {head}; do sleep 0.05; done; exit 1 ;;
esac""",
        "cacp-ray": f"""echo $* >> {tmp_path}/jobs
while ! test -e {head}.joined; do sleep 0.05; done
rm {head}; exit {search_ends_with}""",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = os.environ | SKY["envs"] | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    variables["SKYPILOT_NODE_IPS"] = "10.0.0.5\n10.0.0.6"
    nodes = [
        subprocess.Popen(["bash", "-c", SKY["run"]], env=variables | {"SKYPILOT_NODE_RANK": rank})
        for rank in "01"
    ]
    assert [node.wait(30) for node in nodes] == [code, 0]
    (job,) = (tmp_path / "jobs").read_text().splitlines()
    assert "--address 10.0.0.5:6479 --storage s3://my-bucket" in job


def test_each_target_takes_three_commands():
    for name in LAUNCHER:
        block = next(
            b
            for b in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
            if f"up -y clusters/{name}" in b
        )
        assert len(block.splitlines()) == 3


def test_a_command_with_a_typing_error_does_not_parse():
    for line in (
        "ray up --yess clusters/aws.yaml",
        'ray exec clusters/aws.yaml "cacp-ray search tune_configs/quickstart.yaml --adress auto"',
        "cacp-ray search tune_configs/quickstart.yaml --set cluster.evaluators=3",
    ):
        with pytest.raises(Exception, match=r"(?i)no such option|unknown key"):
            parse(line)

"""What `kubectl apply --kustomize` would send to a cluster, and which pods its network policies let talk to which."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.architecture.deployments import ROOT

K8S = ROOT / "deploy/k8s"
OVERLAYS = {
    "base": K8S / "base",
    **{path.parent.name: path.parent for path in sorted(K8S.glob("overlays/*/kustomization.yaml"))},
}
Manifest = dict[str, Any]


def kustomize_problem() -> str:
    """Why nothing can be rendered here; empty if it can."""
    return "" if shutil.which("kubectl") or shutil.which("kustomize") else "there is neither kubectl nor kustomize"


@functools.cache
def rendered(folder: Path) -> tuple[Manifest, ...]:
    """The manifests of a kustomization."""
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def base_with(component: str, folder: Path) -> Path:
    """A kustomization in `folder` of the base and one component."""
    lines = [f"resources: [{os.path.relpath(K8S / 'base', folder)}]"]
    lines.append(f"components: [{os.path.relpath(K8S / 'components' / component, folder)}]")
    (folder / "kustomization.yaml").write_text("\n".join(lines), encoding="utf-8")
    return folder


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> dict[str, Manifest]:
    """The manifests of a kind by name."""
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


def pod_labels(manifests: tuple[Manifest, ...]) -> dict[str, dict[str, str]]:
    """The labels of every Deployment's pods."""
    found = of_kind(manifests, "Deployment").items()
    return {name: each["spec"]["template"]["metadata"]["labels"] for name, each in found}


def containers(manifests: tuple[Manifest, ...]) -> dict[str, tuple[Manifest, Manifest]]:
    """Pod and container of every Deployment that has one container in its pods."""
    pods = {name: each["spec"]["template"]["spec"] for name, each in of_kind(manifests, "Deployment").items()}
    return {name: (pod, pod["containers"][0]) for name, pod in pods.items() if len(pod["containers"]) == 1}


def variables(container: Manifest) -> dict[str, str]:
    """The environment of a container."""
    return {each["name"]: each["value"] for each in container["env"]}


def matches(selector: Manifest | None, labels: dict[str, str]) -> bool:
    """Whether a LabelSelector without expressions takes a pod; an empty one takes all."""
    assert set(selector or {}) <= {"matchLabels"}, selector
    return (selector or {}).get("matchLabels", {}).items() <= labels.items()


class Network:
    """The network policies of a namespace as Kubernetes means them: what no policy allows is refused.

    A pod is a name of a Deployment; `namespace:NAME` is any pod of another namespace, `anywhere` is an address.
    """

    def __init__(self, manifests: tuple[Manifest, ...]) -> None:
        self.pods = pod_labels(manifests)
        self.policies = [each["spec"] for each in of_kind(manifests, "NetworkPolicy").values()]

    def allows(self, source: str, target: str, port: int) -> bool:
        """Whether a connection from `source` to a port of `target` comes about."""
        leaves = source not in self.pods or self._allows("Egress", source, target, port)
        return leaves and (target not in self.pods or self._allows("Ingress", target, source, port))

    def _allows(self, direction: str, pod: str, peer: str, port: int) -> bool:
        mine = [
            policy
            for policy in self.policies
            if direction in policy["policyTypes"] and matches(policy["podSelector"], self.pods[pod])
        ]
        rules = [rule for policy in mine for rule in policy.get(direction.lower(), [])]
        return not mine or any(self._rule_allows(rule, direction, peer, port) for rule in rules)

    def _rule_allows(self, rule: Manifest, direction: str, peer: str, port: int) -> bool:
        peers = rule.get("from" if direction == "Ingress" else "to")
        ports = rule.get("ports")
        named = not peers or any(self._is(each, peer) for each in peers)
        return named and (not ports or any(each["port"] == port for each in ports))

    def _is(self, selector: Manifest, peer: str) -> bool:
        assert set(selector) in ({"podSelector"}, {"namespaceSelector"}), selector
        if "podSelector" in selector:
            return peer in self.pods and matches(selector["podSelector"], self.pods[peer])
        labels = {"kubernetes.io/metadata.name": peer.removeprefix("namespace:")}
        return peer.startswith("namespace:") and matches(selector["namespaceSelector"], labels)

"""deploy/k8s: what pods may do, and who may talk to whom."""

import pytest

from tests.architecture.kubernetes import (
    OVERLAYS,
    Network,
    containers,
    kustomize_problem,
    matches,
    of_kind,
    pod_labels,
    rendered,
)

pytestmark = pytest.mark.skipif(bool(kustomize_problem()), reason=kustomize_problem())

PRODUCTION = OVERLAYS["production"]
SERVING_PORT, METRICS_PORT = 50051, 9464


def test_pods_are_as_locked_down_as_the_restricted_standard_wants(manifests):
    assert (
        of_kind(manifests, "Namespace")["usagi"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )
    assert set(containers(manifests)) == set(pod_labels(manifests)), "one container each"
    for pod, container in containers(manifests).values():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["runAsGroup"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]


@pytest.mark.parametrize(
    ("source", "target", "port", "allowed"),
    [
        ("anywhere", "gateway", 8080, True),
        ("anywhere", "gateway", METRICS_PORT, False),
        ("gateway", "vision", SERVING_PORT, True),
        ("gateway", "vision", METRICS_PORT, False),
        ("vision", "vision", SERVING_PORT, True),
        ("anywhere", "vision", SERVING_PORT, False),
        ("namespace:default", "vision", SERVING_PORT, False),
        ("prometheus", "vision", METRICS_PORT, True),
        ("prometheus", "gateway", METRICS_PORT, True),
        ("prometheus", "vision", SERVING_PORT, False),
        ("vision", "gateway", 8080, False),
        ("vision", "anywhere", 443, False),
        ("gateway", "anywhere", 443, False),
        ("vision", "namespace:kube-system", 53, True),
        ("vision", "anywhere", 53, False),
        ("vision", "namespace:kube-system", 443, False),
        ("namespace:keda", "prometheus", 9090, True),
        ("anywhere", "prometheus", 9090, False),
        ("gateway", "prometheus", 9090, False),
    ],
)
def test_who_may_talk_to_whom(source, target, port, allowed):
    assert Network(rendered(PRODUCTION)).allows(source, target, port) is allowed


def test_no_policy_names_pods_that_are_not_there():
    network = Network(rendered(PRODUCTION))
    selectors = [policy["podSelector"] for policy in network.policies]
    for policy in network.policies:
        for rule in (*policy.get("ingress", []), *policy.get("egress", [])):
            peers = [*rule.get("from", []), *rule.get("to", [])]
            selectors += [peer["podSelector"] for peer in peers if "podSelector" in peer]
    for selector in selectors:
        assert any(matches(selector, labels) for labels in network.pods.values()), selector

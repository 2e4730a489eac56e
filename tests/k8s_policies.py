"""Who may talk to whom by the rendered network policies, as a cluster would work it out."""

from __future__ import annotations

from typing import Any

from k8s_render import matches

Labels = dict[str, str]
Policy = dict[str, Any]
"""The spec of one."""
NAMESPACE: Labels = {"kubernetes.io/metadata.name": "pedro"}


def component(name: str) -> dict[str, str]:
    """The labels of a pod: "finetune", or "finetune/head" for its driver's."""
    name, _, node = name.partition("/")
    return {"app.kubernetes.io/component": name} | ({"ray.io/node-type": node} if node else {})


def peer_matches(peer: dict[str, Any], labels: dict[str, str], namespace: dict[str, str]) -> bool:
    """NetworkPolicyPeer: without a namespaceSelector it means the policy's own namespace."""
    if "ipBlock" in peer:
        return False
    if not matches(peer.get("namespaceSelector", {"matchLabels": NAMESPACE}), namespace):
        return False
    return matches(peer.get("podSelector", {}), labels)


def direction_allows(
    policies: list[Policy], side: str, here: Labels, there: Labels, namespace: Labels, port: int
) -> bool:
    """Whether the `side` (Ingress or Egress) rules of the pod `here` let it talk with `there` on `port`."""
    key = "from" if side == "Ingress" else "to"
    for policy in policies:
        if side not in policy["policyTypes"] or not matches(policy["podSelector"], here):
            continue
        for rule in policy.get(side.lower(), []):
            ports = {entry["port"] for entry in rule.get("ports", [])}
            if (not ports or port in ports) and any(peer_matches(peer, there, namespace) for peer in rule[key]):
                return True
    return False


def may_talk(policies: list[Policy], source: Labels, target: Labels, port: int, namespace: Labels = NAMESPACE) -> bool:
    """Both ends must allow it; a source in another namespace is under that namespace's policies, not ours."""
    into = direction_allows(policies, "Ingress", target, source, namespace, port)
    return into and (namespace != NAMESPACE or direction_allows(policies, "Egress", source, target, NAMESPACE, port))

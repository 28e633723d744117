"""The metrics of the whole graph as one page, read from Ray's metrics agents.

Each node of a Ray cluster has an agent that tells the metrics of every process of the node. In come
their pages; out goes ours: `atlas_*` alone, without Ray's prefix and Ray's labels. The process
stays in the label `worker`, because a sum over processes would fall when one of them ends, and
Prometheus would take that for a restart.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx2

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
"""How long an agent may take; the page goes without one that takes longer."""
_PREFIX = "ray_atlas_"
_LABEL = re.compile(r'(\w+)="((?:\\.|[^"\\])*)"')
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)(?: \S+)?")
_PARTS = re.compile(r"_(?:total|bucket|count|sum)$")
_RAYS = frozenset({"Component", "JobId", "NodeAddress", "SessionName", "Version", "WorkerId"})
_WORKER_CHARS = 8


@dataclass
class _Family:
    about: dict[str, str] = field(default_factory=dict)
    """`HELP` and `TYPE`."""
    samples: list[str] = field(default_factory=list)


async def read_agents(addresses: Sequence[str]) -> str:
    """One page of what agents tell.

    Args:
        addresses: Of the agents' pages; one that does not answer in time is left out.
    """
    async with httpx2.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
        texts = await asyncio.gather(*(_read(client, address) for address in addresses))
    return merged(texts)


async def _read(client: httpx2.AsyncClient, address: str) -> str:
    try:
        response = await client.get(address)
        response.raise_for_status()
    except httpx2.HTTPError as error:
        logger.warning("a node's metrics cannot be read: %s", type(error).__name__)
        return ""
    return response.text


def merged(pages: Sequence[str]) -> str:
    """Agents' pages as one, each family of metrics once."""
    families: dict[str, _Family] = {}
    for page in pages:
        for line in page.splitlines():
            if line.startswith("# "):
                _, what, name, *rest = line.split(" ", 3)
                if name.startswith(_PREFIX):
                    about = families.setdefault(_family(name), _Family()).about
                    about.setdefault(what, f"# {what} {name.removeprefix('ray_')} {''.join(rest)}")
            elif line.startswith(_PREFIX) and (sample := _SAMPLE.fullmatch(line)):
                name, labels, value = sample.groups()
                families.setdefault(_family(name), _Family()).samples.append(
                    f"{name.removeprefix('ray_')}{_ours(labels or '')} {value}"
                )
    lines = [line for of in families.values() for line in (*of.about.values(), *of.samples)]
    return "".join(f"{line}\n" for line in lines)


def _family(name: str) -> str:
    return _PARTS.sub("", name)


def _ours(labels: str) -> str:
    kept = []
    for name, value in _LABEL.findall(labels):
        if name == "WorkerId":
            kept.append(f'worker="{value[:_WORKER_CHARS]}"')
        elif name not in _RAYS and not name.startswith("otel_"):
            kept.append(f'{name}="{value}"')
    return "{" + ",".join(kept) + "}" if kept else ""

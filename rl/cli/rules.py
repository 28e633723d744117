"""`atlas rules …`: calibrate rules, test them on labelled texts, change them while they serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from serve_app.cli.console import (
    DEFAULT_URL,
    AdminClient,
    KeyOption,
    NanoConfigOption,
    UrlOption,
    api_errors,
    console,
    fail,
    load,
)
from serve_app.config import AtlasConfig, load_config
from serve_app.config.rules import LlmRuleConfig, SemanticRuleConfig
from serve_app.errors import ConfigError
from serve_app.pool.desired import written_rules

app = typer.Typer(help="Calibrate, test and change rules.", no_args_is_help=True)

TextsArgument = Annotated[
    Path, typer.Argument(help="JSONL: text (or messages) and label on each line.")
]
_NANO = Path("configs/nano.yaml")
_MAX_SHOWN = 20


@app.command()
def fit(
    file: TextsArgument,
    config: NanoConfigOption = _NANO,
    rule: Annotated[list[str] | None, typer.Option(help="Rules to calibrate. [all]")] = None,
) -> None:
    """Calibrate semantic rules on labelled texts; writes the files that their `fitted` names."""
    from rl.fit.rules import fit_rule, read_labelled

    try:
        deployment = load_config(config, fitted=False)
        texts = read_labelled(file)
        places = _places(config)
        semantic = [of for of in deployment.rules if isinstance(of, SemanticRuleConfig)]
        unknown = set(rule or ()) - {of.name for of in semantic}
        if unknown:
            raise ConfigError(f"{config} has no semantic rule {min(unknown)!r}")
        encode = _encoder(deployment)
        for of in semantic:
            if rule and of.name not in rule:
                continue
            if of.name not in places:
                raise ConfigError(
                    f"rule {of.name!r}: name the file to write: `fitted: ./{of.name}.json`"
                )
            fitted = fit_rule(of, texts, deployment.embedder.model, encode)
            places[of.name].write_text(fitted.model_dump_json(indent=2) + "\n")
            console.print(
                f"rule {of.name}: fitted on {fitted.examples} texts -> {places[of.name]}",
                highlight=False,
                soft_wrap=True,
            )
    except ConfigError as error:
        raise fail(error.message) from None


@app.command("test")
def try_command(
    file: TextsArgument,
    config: NanoConfigOption = _NANO,
    url: Annotated[
        str | None,
        typer.Option(help="A gateway that decides, models that decide included. [decide here]"),
    ] = None,
    api_key: KeyOption = "none",
) -> None:
    """Show accuracy, coverage and confusion of rules on labelled texts."""
    from rl.fit.rules import evaluate_rules, read_labelled, report

    deployment = load(config)
    if not deployment.rules:
        raise fail(f"{config} has no rules")
    try:
        texts = read_labelled(file)
    except ConfigError as error:
        raise fail(error.message) from None
    if url is None:
        result = evaluate_rules(deployment.rules, texts, _encoder(deployment))
        if any(isinstance(of, LlmRuleConfig) for of in deployment.rules):
            console.print("rules that ask a model are left out; --url tests them too")
    else:
        found = _asked(deployment, [list(of.messages) for of in texts], url, api_key)
        result = report(deployment.rules, texts, found)
    table = Table("rule", "kind", "saw", "decided", "right", "alone: decided", "right", "ms")
    for tally, alone in zip(result.in_order, result.alone, strict=True):
        median_ms = sorted(alone.seconds)[len(alone.seconds) // 2] * 1e3 if alone.seconds else 0.0
        table.add_row(
            tally.name,
            tally.kind,
            str(tally.num_texts),
            f"{tally.num_decided} ({tally.coverage:.1%})",
            _share(tally.accuracy),
            f"{alone.num_decided} ({alone.coverage:.1%})",
            _share(alone.accuracy),
            f"{median_ms:.3f}",
        )
    console.print(table)
    console.print(f"together: {result.accuracy:.1%} of {len(texts)} right", highlight=False)
    wanted = sorted({of for of, _ in result.confusion})
    got = sorted({of for _, of in result.confusion})
    table = Table("wanted", *got, title="confusion: wanted against found")
    for label in wanted:
        table.add_row(label, *(str(result.confusion[label, of]) for of in got))
    console.print(table)
    for of, label in result.wrong[:_MAX_SHOWN]:
        console.print(f"  {of.label} -> {label}: {of.text[:90]!r}", highlight=False, markup=False)


@app.command("list")
def list_command(url: UrlOption = DEFAULT_URL, api_key: KeyOption = "none") -> None:
    """List the rules in their order."""
    table = Table("rule", "kind", "floor", "sends to", "reason")
    for row in AdminClient(url, api_key).call("GET", "/rules")["data"]:
        rule: dict[str, Any] = row["rule"]
        targets = [rule, *rule.get("routes", ()), *rule.get("labels", ())]
        sent = [", ".join(of["use"]) for of in targets if "use" in of]
        sent += ["among" for of in targets if "among" in of]
        table.add_row(
            rule.get("name", "default"),
            rule["type"],
            str(rule.get("floor", "")),
            "; ".join(dict.fromkeys(sent)),
            row["reason"] or "",
        )
    console.print(table)


@app.command("set")
def set_command(
    config: Annotated[Path, typer.Argument(help="Configuration file whose rules are taken.")],
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
) -> None:
    """Put a configuration's rules in place of those that serve."""
    rules = list(written_rules(load(config)))
    taken = AdminClient(url, api_key).call("PUT", "/rules", {"rules": rules})
    console.print(f"{taken['count']} rules serve from revision {taken['revision']}")


def _share(of: float | None) -> str:
    return "" if of is None else f"{of:.1%}"


def _encoder(config: AtlasConfig) -> Any:
    from serve_app.embedder.encoder import TextEncoder

    return TextEncoder(config.embedder, config.data_path() / "cache").encode


def _places(config: Path) -> dict[str, Path]:
    """Of each rule that names one, the file of its calibration."""
    rules = yaml.safe_load(config.read_text()).get("rules", [])
    return {
        rule["name"]: config.parent / rule["fitted"]
        for rule in rules
        if isinstance(rule, dict) and isinstance(rule.get("fitted"), str)
    }


def _asked(
    config: AtlasConfig, conversations: list[list[dict[str, Any]]], url: str, api_key: str
) -> dict[str, list[Any]]:
    """What each rule of a gateway found in each conversation."""
    import openai

    from rl.fit.rules import Found

    names = [rule.name for rule in config.rules if rule.type != "default"]
    found: dict[str, list[Any]] = {name: [] for name in names}
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key)
    for messages in conversations:
        body = {"model": "atlas", "messages": messages}
        with api_errors(url):
            decision: Any = client.post("/route", cast_to=object, body=body)
        hops = {hop["rule"]: hop for hop in decision["hops"]}
        for name in names:
            hop = hops.get(name)
            if hop is None:
                found[name].append(Found(None))
            else:
                label = hop["label"] if hop["decided"] else None
                found[name].append(Found(label, hop["confidence"] or 0.0, hop["seconds"]))
    return found

"""What `python -m serve versions` prints."""

from rich.console import Console
from rich.table import Table

from serve.registry import Registry

SHOWN_CHANGES = 20


def print_registry(registry: Registry) -> None:
    """A table of the versions with their aliases, and one of the last changes."""
    head, versions, changes = registry.head(), registry.versions(), registry.changes()
    aliases = {head.champion: "champion", head.challenger: "challenger"}
    table = Table(title=f"versions in {registry.folder}", title_justify="left")
    for name in ("version", "alias", "run", "items", "MB", "test/ndcg@10", "registered"):
        table.add_column(name, justify="right" if name in ("items", "MB", "test/ndcg@10") else "left")
    for version in versions:
        metric = version.metrics.get("test/ndcg@10")
        table.add_row(
            str(version.number), aliases.get(version.number, ""), version.run_id, f"{version.num_items:,}",
            f"{version.num_bytes / 1e6:,.1f}", "" if metric is None else f"{metric:.4f}", version.when,
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    table = Table(title=f"changes, the last {SHOWN_CHANGES}", title_justify="left")
    for name in ("change", "when", "who", "what", "from", "to", "why"):
        table.add_column(name)
    for change in changes[-SHOWN_CHANGES:]:
        old, new = (str(version or "none") for version in (change.old, change.new))
        what = f"{change.action} {change.alias}"
        table.add_row(str(change.number), change.when, change.who, what, old, new, change.why)
    console.print(table)

"""The `tandem` command: one file per verb. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

from cli.app import app
from cli.bench import bench
from cli.down import down
from cli.drain import drain
from cli.explain import explain
from cli.generate import generate
from cli.kv import kv
from cli.plan import plan
from cli.profile import profile
from cli.role import role
from cli.sim import sim
from cli.status import status
from cli.trace import trace
from cli.up import up

for verb in (up, down, status, generate, explain, bench, profile, drain, role, sim, plan):
    app.command()(verb)
app.add_typer(kv, name="kv")
app.add_typer(trace, name="trace")

if __name__ == "__main__":
    app(prog_name="tandem")

"""The same two apps on Flower's own simulation runtime (Ray)."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from lichen.common.errors import Code, LichenError


def run_on_ray(server_app: ServerApp, client_app: ClientApp, homes: list[Path], run_config: dict[str, Any], threads: int) -> None:
    """Run a federation on Ray, one process for each core.

    Flower gives a simulated client a partition number and a simulation no run config; the two wrappers supply what the apps read. It
    also gives its nodes new random ids in each run, so a cohort that leaves clients out is another in each run.

    Args:
        server_app: the coordinator's app.
        client_app: the clients' app.
        homes: the clients' node homes.
        run_config: for the server app.
        threads: cores for each client.

    Raises:
        LichenError: EXTRA_MISSING, if Ray is not installed; what the server app raised.
    """
    try:
        import ray  # noqa: F401
        from flwr.simulation import run_simulation
    except ImportError:
        raise LichenError(Code.EXTRA_MISSING, "the Ray engine is not installed", fix="pip install 'lichen[ray]'") from None

    if logging.getLogger().level > logging.DEBUG:  # Flower's log is for `lichen --verbose`: its errors come back as replies, or raise here
        logging.getLogger("flwr").setLevel(logging.CRITICAL)
    failure: list[BaseException] = []
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        context.run_config |= run_config
        try:
            server_app(grid, context)
        except BaseException as error:
            failure.append(error)
            raise

    # Ray copies the wrapper to its workers by value, so it may hold plain strings only
    client = _client([str(home) for home in homes])
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # Ray would warn of a change to come in how it hides GPUs
    try:
        run_simulation(
            server_app=server,
            client_app=client,
            num_supernodes=len(homes),
            backend_config={"client_resources": {"num_cpus": threads, "num_gpus": 0.0}},
        )
    except BaseException:
        if failure:
            raise failure[0] from None
        raise


def _client(homes: list[str]) -> ClientApp:
    client = ClientApp()

    def serve(message: Message, context: Context) -> Message:
        from lichen.client.app import app

        home = Path(homes[int(context.node_config["partition-id"])])
        context.node_config |= {"home": str(home), "name": home.name, "simulated": True}
        return app(message, context)

    client.train()(serve)
    client.evaluate()(serve)
    return client

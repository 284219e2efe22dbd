"""How torchrun's agents meet: as its own backends do, but for where their stores listen, and that no store ends with a
rank.

torchrun's static rendezvous lets rank 0's agent hold one store for agents and ranks; its elastic one orders the hosts
anew at every start. Both listen on every interface, and the elastic one's ranks either share a store between starts,
where a host that did not fail itself reads the last start's addresses, or rank 0 holds it and takes it along when it
ends. Here an agent holds a store a start, bound to the address of its host.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from funczero.world.rendezvous import listen, serve, visit

BACKEND = "funczero"
READ = timedelta(seconds=60)  # torchrun's own patience with its store


def register(address: str, port: int, listener: int | None, elastic: bool, told: Callable[[str], None]) -> None:
    """Make BACKEND known to torchrun in this process.

    Args:
      address, port: of rank 0's host.
      listener: this is rank 0's host: the descriptor of a socket that listens there.
      elastic: hosts may be lost and come back; otherwise ranks lie in the order of the hosts.
      told: takes a sentence for the user.
    """
    make = _Elastic if elastic else _Static
    rendezvous_handler_registry.register(BACKEND, lambda params: make(params, address, port, listener, told))


class _Static(RendezvousHandler):
    """Every host has its number."""

    def __init__(
        self, params: RendezvousParameters, address: str, port: int, listener: int | None, told: Callable[[str], None]
    ) -> None:
        self.rank, self.size, self.run = params.get_as_int("rank", 0), params.max_nodes, params.run_id
        self.address, self.port, self.told = address, port, told
        timeout = timedelta(seconds=params.get_as_int("timeout", 900) or 900)
        self.store = visit(address, port, timeout) if listener is None else serve(listener, address, port, timeout)

    @property
    def use_agent_store(self) -> bool:
        """Ranks are told that they need not hold one."""
        return True

    def get_backend(self) -> str:
        """Its name."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """There is one only."""
        return RendezvousInfo(
            PrefixStore(self.run, self.store), self.rank or 0, self.size, RendezvousStoreInfo(self.address, self.port)
        )

    def is_closed(self) -> bool:
        """Never."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Nobody may come later."""
        return 0

    def get_run_id(self) -> str:
        """The launch's."""
        return self.run

    def shutdown(self) -> bool:
        """It ends with its process."""
        return True


class _Elastic(_Static):
    """torchrun's dynamic rendezvous, with a store of its own for the ranks of every start."""

    def __init__(
        self, params: RendezvousParameters, address: str, port: int, listener: int | None, told: Callable[[str], None]
    ) -> None:
        super().__init__(params, address, port, listener, told)
        self.inner = create_handler(self.store, C10dRendezvousBackend(self.store, params.run_id), params)
        self.ranks: Any = None  # the store of this start's ranks, where this agent holds it

    def next_rendezvous(self) -> RendezvousInfo:
        """Who takes part now, and where their store is: with the agent that is the first of them."""
        info = self.inner.next_rendezvous()
        if info.rank == 0:
            assert info.bootstrap_store_info
            address = info.bootstrap_store_info.master_addr  # --local-addr of this host
            listener = listen(address, 0, self.size == 1)
            if listener.said:
                self.told(listener.said)
            said = f"{listener.port} {address}"
            # the last start's ranks have ended, and so does their store
            self.ranks = serve(listener, address, listener.port)
            info.store.set("funczero/ranks", said)
        port, _, address = info.store.get("funczero/ranks").decode().partition(" ")
        return RendezvousInfo(info.store, info.rank, info.world_size, RendezvousStoreInfo(address, int(port)))

    def is_closed(self) -> bool:
        """The inner one's."""
        return self.inner.is_closed()

    def set_closed(self) -> None:
        """The inner one's."""
        self.inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """The inner one's."""
        return self.inner.num_nodes_waiting()

    def shutdown(self) -> bool:
        """The inner one's."""
        return self.inner.shutdown()

"""The line from a process that trains to its parent, where it has one."""

import os
import socket
import threading
import time
from typing import NoReturn

from easylm.command import HOST_LOST_CODE
from easylm.hosts.wire import Wire

# What a parent tells its child: the number of an open file, and where the first parent listens.
LINK, HUB = "EASYLM_LINK", "EASYLM_HUB"
# How often a process says that it is alive; its silence tells only who is to blame for a loss.
BEAT_SECONDS = 5.0
# The parent ends this process well before, when all others have been told.
_PATIENCE_SECONDS = 60


class Link:
    """To the parent.

    Attributes:
      is_there: whether there is one; else what is told goes nowhere.
      last_steps: host -> its last finished step, as of the parent's last heartbeat.
    """

    def __init__(self):
        self.is_there = LINK in os.environ
        self.last_steps: dict[int, int] = {}
        if self.is_there:
            number = int(os.environ.pop(LINK))
            os.set_inheritable(number, False)  # it is not for the processes that this one starts
            self._wire = Wire(socket.socket(fileno=number))
            self._hub = os.environ.pop(HUB)
            threading.Thread(target=self._listen, daemon=True).start()
            threading.Thread(target=self._beat, daemon=True).start()

    def hub(self) -> str:
        """Where this host's parent listens, if others are to find it there; or nothing."""
        return self._hub if self.is_there else ""

    def tell(self, **message) -> None:
        """Sends a message, if there is a parent."""
        if self.is_there:
            self._wire.send(**message)

    def fail(self, message: str, code: int, *, grace: float) -> NoReturn:
        """Says why this process cannot go on, and waits for its end.

        The others hear of it first: their processes would stumble over the loss of this one.

        Args:
          message: for people.
          code: exit code that it means.
          grace: seconds in which a better reason may come from another host.
        """
        self.tell(failed=message, code=code, grace=grace)
        time.sleep(_PATIENCE_SECONDS)
        os._exit(code)

    def _beat(self) -> None:
        while True:
            self.tell(alive=True)
            time.sleep(BEAT_SECONDS)

    def _listen(self) -> None:
        for message in self._wire:
            self.last_steps = {int(host): step for host, step in message["steps"].items()}
        os._exit(HOST_LOST_CODE)  # without a parent nobody would end this process


parent = Link()

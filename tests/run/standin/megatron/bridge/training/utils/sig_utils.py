"""A handler of a signal, as a context that the script never enters."""

import signal


class DistributedSignalHandler:
    """Remembers a signal, once it is entered."""

    def __init__(self, sig=signal.SIGTERM):
        self.sig = sig
        self.received = False

    def __enter__(self):
        signal.signal(self.sig, self._remember)
        return self

    def __exit__(self, *error):
        pass

    def _remember(self, number, frame):
        self.received = True

"""The content-addressed artifact store: what a stage made, from what, by which code. Standard library."""

from artifacts.keys import canonical, digest
from artifacts.ledger import Ledger
from artifacts.loaded import record
from artifacts.locks import FileLock
from artifacts.records import Record
from artifacts.refs import Ref
from artifacts.store import Store, StoreError

record()

__all__ = ["FileLock", "Ledger", "Record", "Ref", "Store", "StoreError", "canonical", "digest"]

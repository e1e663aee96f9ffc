"""The content-addressed artifact store: what a stage made, from what, by which code. Standard library."""

from artifacts.keys import canonical, code_digest, digest
from artifacts.ledger import Ledger
from artifacts.locks import FileLock
from artifacts.records import Record
from artifacts.refs import Ref
from artifacts.store import Store, StoreError

__all__ = ["FileLock", "Ledger", "Record", "Ref", "Store", "StoreError", "canonical", "code_digest", "digest"]

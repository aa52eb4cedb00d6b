"""Personal data replaced by surrogates: find, make, count."""

from qcore.data.anonymize.anonymizer import REGIONS, Anonymizer
from qcore.data.anonymize.audit import Audit
from qcore.data.anonymize.files import key_of_file, list_of_file
from qcore.data.anonymize.recognizers import KINDS

__all__ = ["KINDS", "REGIONS", "Anonymizer", "Audit", "key_of_file", "list_of_file"]

"""The methods, one file each. `base.py` says what a method is.

Every file of this folder is imported, so that a method needs no entry here.
"""

import importlib
import pkgutil

from keras_svdtune.methods.base import METHODS as METHODS
from keras_svdtune.methods.base import Method as Method
from keras_svdtune.methods.base import register as register

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

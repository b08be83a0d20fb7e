# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Analysis measures a trained model and does not change it."""

# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Text to blocks of tokens: corpora, tokenizers, packing, masking."""

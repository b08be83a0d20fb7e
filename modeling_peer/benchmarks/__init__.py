"""Time and memory of a layer and of whole models, against their rivals, on the machine at hand."""

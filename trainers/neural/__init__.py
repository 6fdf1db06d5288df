"""Neural models in torch: trained here, served as ONNX without it."""

import os

# Idle OpenMP threads that spin slow a shared machine several times over; torch reads this when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""Load and call a repo's handler as huggingface_inference_toolkit does. A script, run where minilora_hub is missing.

    python -P endpoint_toolkit.py FOLDER < bodies.jsonl > answers.jsonl

The toolkit imports handler.py from the folder under the name "handler.EndpointHandler" with the folder in front of
sys.path, makes EndpointHandler(folder) once, calls it with each body, and answers an exception with its text.
"""

import importlib.util
import json
import os
import sys

sys.modules["minilora_hub"] = None  # importing it fails
folder = sys.argv[1]
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", os.path.join(folder, "handler.py"))
sys.path.insert(0, folder)
module = importlib.util.module_from_spec(spec)
sys.modules["handler.EndpointHandler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)
for line in sys.stdin:
    try:
        answer = handler(json.loads(line))
    except Exception as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    answers.write(json.dumps(answer) + "\n")

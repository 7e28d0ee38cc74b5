#!/usr/bin/env bash
# accelerate takes parameters that lie side by side in one memory, as torch's vector_to_parameters leaves them, for tied ones: save_model and save_state write the first, drop the others and log that this should be OK. Who averages weights as vectors, in federated or evolutionary training, loses the network.
# Guessed before running: tensors that do not overlap are all written, or saving is refused, as safetensors' own save_model does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
env/bin/python -W ignore - <<'PY'
import accelerate
import safetensors
import torch
from safetensors.torch import load_file, save_model
from torch import nn

print(f"accelerate {accelerate.__version__}, safetensors {safetensors.__version__}, torch {torch.__version__}")
accelerator = accelerate.Accelerator(cpu=True)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


clients = [network(seed) for seed in range(3)]
vectors = [nn.utils.parameters_to_vector(client.parameters()).detach() for client in clients]
server = network(3)
nn.utils.vector_to_parameters(torch.stack(vectors).mean(0), server.parameters())
try:
    save_model(server, "refused.safetensors")
except RuntimeError as error:
    print("safetensors' save_model refuses:", str(error)[:60])
else:
    raise SystemExit("safetensors saves it")

accelerator.save_model(server, "saved")
names = {name for name, _ in server.named_parameters()}
written = names & set(load_file("saved/model.safetensors"))
print(f"save_model: {len(written)} of {len(names)} parameters written: {written}")
fresh, x = network(4), torch.randn(2, 3, 12, 12)
accelerate.load_checkpoint_in_model(fresh, "saved")
with torch.no_grad():
    off = ((fresh(x) - server(x)).abs().max() / server(x).abs().max()).item()
print(f"load_checkpoint_in_model raises nothing; the output is {off:.0%} off")
assert written == {"0.weight"} and off > 0.1

accelerator.prepare(server)
accelerator.save_state("state")
written = names & set(load_file("state/model.safetensors"))
try:
    accelerator.load_state("state")
except RuntimeError as error:
    print(f"save_state: {len(written)} of {len(names)} written; load_state, when it is too late:", str(error)[:60])
else:
    raise SystemExit("load_state raises nothing")
assert written == {"0.weight"}
PY

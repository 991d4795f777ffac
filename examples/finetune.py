"""Fine-tune a model on chats, from Python: `python examples/finetune.py MODEL DATA OUTPUT_DIR`.

MODEL is a folder or hub repository with a chat template, DATA a file of chats such as `{"messages": [...]}` a line.
"""

import sys

import torch

from chronicals import TrainConfig, Trainer, load_model, save_model

base_model, data, output_dir = sys.argv[1:]
config = TrainConfig(
    base_model=base_model,
    datasets=[{"path": data}],
    val_set_size=0.1,  # a tenth of the documents is held out and evaluated before, during and after training
    learning_rate=1e-4,
    output_dir=output_dir,
)
result = Trainer(config).train()
print(f"{result.status}: {result.steps} steps, eval_loss {result.eval_loss:.4f}, in {result.output_dir}")

model = load_model(output_dir)  # a torch.nn.Module; transformers loads the folder as well
save_model(model, f"{output_dir}/float16", dtype=torch.float16)

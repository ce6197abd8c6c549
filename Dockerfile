# synco-fast on NVIDIA's PyTorch image, which brings CUDA, PyTorch, torchvision, Triton, DALI and apex.
#   docker build -t synco-fast .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 -v /data:/data -v "$PWD/runs:/work/runs" synco-fast \
#     pretrain --config synco-r50-200 --data /data/imagenet
# Another base, for example without a GPU: --build-arg BASE=... of any image with Python 3.11 or later and torch 2.11 to 2.14.
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}

WORKDIR /opt/synco-fast
COPY . .
# The image's own PyTorch stays: its version is a pre-release by name, which pip would replace.
RUN python -c 'import torch, torchvision, triton' \
 && pip install --no-cache-dir jinja2 matplotlib numpy pillow 'pydantic>=2.7,<3' pyyaml rich safetensors tensorboard \
 && pip install --no-cache-dir --no-deps timm . \
 && pip install --no-cache-dir huggingface_hub \
 && synco-fast presets > /dev/null

WORKDIR /work
ENTRYPOINT ["synco-fast"]
CMD ["--help"]

"""Which Vision Transformers can be converted: one file a library, one table."""

from lape.hosts import compact, huggingface, huggingface_maps, huggingface_stages, timm, torchvision
from lape.hosts.base import Anatomy, Host, class_name, find_host, host_named, host_of_library, hosts, register_host

for _host in timm.HOSTS:
    register_host(_host)
register_host(compact.COMPACT_TRANSFORMER)
register_host(huggingface.TRANSFORMERS)
register_host(huggingface_stages.HOST)
register_host(huggingface_maps.HOST)
register_host(torchvision.VISION_TRANSFORMER)

__all__ = [
    "Anatomy",
    "Host",
    "class_name",
    "find_host",
    "host_named",
    "host_of_library",
    "hosts",
    "register_host",
]

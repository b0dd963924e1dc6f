"""Which Vision Transformers can be converted: one file a library, one table."""

from lape.host import huggingface, timm, torchvision
from lape.host.base import Host, check_module, class_name, find_host, host_named, host_of_library, hosts, register_host

for _host in (*timm.HOSTS, *huggingface.HOSTS, torchvision.VISION_TRANSFORMER):
    register_host(_host)

__all__ = ["Host", "check_module", "class_name", "find_host", "host_named", "host_of_library", "hosts", "register_host"]

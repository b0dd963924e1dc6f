"""Which Vision Transformers can be converted: one file a library, one table."""

from lape.host import huggingface, mvit, paths, timm, torchvision
from lape.host.base import (
    Host,
    add_host,
    check_module,
    class_name,
    find_host,
    host_named,
    host_of_library,
    hosts,
)
from lape.host.paths import register_host
from lape.host.suggest import Suggestion, suggest_host

for _host in (*timm.HOSTS, *huggingface.HOSTS, *torchvision.HOSTS, *mvit.HOSTS, *paths.HOSTS):
    add_host(_host)

__all__ = [
    "Host",
    "Suggestion",
    "check_module",
    "class_name",
    "find_host",
    "host_named",
    "host_of_library",
    "hosts",
    "register_host",
    "suggest_host",
]

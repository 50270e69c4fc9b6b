// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The two wizards as tables: steps, their fields, what they start with. What a field accepts, and its help, come from
// the API's schema; a field that the API does not know is not shown.
import type { Source } from '../forms/choices';
import type { Values } from '../forms/values';

export interface FieldSpec {
  /** As in forms/values.ts. */
  name: string;
  label: string;
  source?: Source;
  suggestions?: readonly string[];
  secret?: boolean;
  lines?: number;
  /** Needed here although the API could do without. */
  needed?: boolean;
  /** Shown only when the other values ask for it. */
  shown?: (values: Values) => boolean;
}

export interface StepSpec {
  title: string;
  fields: FieldSpec[];
}

export interface WizardSpec {
  title: string;
  path: string;
  type: 'qemu' | 'lxc';
  steps: StepSpec[];
  initial: Values;
}

const staticAddress = (key: string) => (values: Values) => (values[key] ?? '').includes('/');
const hasDisk = (key: string) => (values: Values) => Boolean(values[`${key}:storage`]);
const hasBridge = (values: Values) => Boolean(values['net0.bridge']);

const CONTAINER: WizardSpec = {
  title: 'Create a container',
  path: '/nodes/{node}/lxc',
  type: 'lxc',
  steps: [
    {
      title: 'General',
      fields: [
        { name: 'node', label: 'Node', source: 'nodes', needed: true },
        { name: 'vmid', label: 'ID', needed: true },
        { name: 'hostname', label: 'Host name' },
        { name: 'password', label: 'Password of root', secret: true },
        { name: 'ssh-public-keys', label: 'SSH keys of root', lines: 2 },
        { name: 'unprivileged', label: 'Unprivileged' },
      ],
    },
    { title: 'Template', fields: [{ name: 'ostemplate', label: 'Template', source: 'volumes/vztmpl', needed: true }] },
    {
      title: 'Disk',
      fields: [
        { name: 'rootfs:storage', label: 'Storage', source: 'storages/rootdir', needed: true },
        { name: 'rootfs:size', label: 'Size (GiB)', needed: true },
      ],
    },
    {
      title: 'CPU and memory',
      fields: [
        { name: 'cores', label: 'CPU cores' },
        { name: 'cpulimit', label: 'CPU limit' },
        { name: 'memory', label: 'Memory (MiB)' },
        { name: 'swap', label: 'Swap (MiB)' },
      ],
    },
    {
      title: 'Network',
      fields: [
        { name: 'net0.bridge', label: 'Bridge', source: 'bridges' },
        { name: 'net0.name', label: 'Name in the container', shown: hasBridge },
        { name: 'net0.ip', label: 'IPv4', suggestions: ['dhcp', 'manual'], shown: hasBridge },
        { name: 'net0.gw', label: 'Gateway (IPv4)', shown: staticAddress('net0.ip') },
        { name: 'net0.ip6', label: 'IPv6', suggestions: ['auto', 'dhcp', 'manual'], shown: hasBridge },
        { name: 'net0.gw6', label: 'Gateway (IPv6)', shown: staticAddress('net0.ip6') },
        { name: 'net0.hwaddr', label: 'MAC address', shown: hasBridge },
        { name: 'nameserver', label: 'DNS server' },
        { name: 'searchdomain', label: 'DNS search domain' },
      ],
    },
  ],
  initial: { unprivileged: '1', 'rootfs:size': '8', 'net0.name': 'eth0', 'net0.ip': 'dhcp', cores: '1', memory: '512', swap: '0' },
};

const MACHINE: WizardSpec = {
  title: 'Create a virtual machine',
  path: '/nodes/{node}/qemu',
  type: 'qemu',
  steps: [
    {
      title: 'General',
      fields: [
        { name: 'node', label: 'Node', source: 'nodes', needed: true },
        { name: 'vmid', label: 'ID', needed: true },
        { name: 'name', label: 'Name' },
        { name: 'onboot', label: 'Start with the node' },
      ],
    },
    {
      title: 'Boot',
      fields: [
        { name: 'kernel', label: 'Kernel', source: 'volumes/snippets' },
        { name: 'initrd', label: 'Initial RAM disk', source: 'volumes/snippets' },
        { name: 'cmdline', label: 'Kernel command line' },
        { name: 'bios', label: 'Firmware' },
        { name: 'ostype', label: 'Operating system' },
      ],
    },
    {
      title: 'Disk',
      fields: [
        { name: 'virtio0:storage', label: 'Storage', source: 'storages/images' },
        { name: 'virtio0:size', label: 'Size (GiB)', shown: hasDisk('virtio0') },
        { name: 'virtio0.import-from', label: 'Copy of', source: 'volumes/import', shown: hasDisk('virtio0') },
        { name: 'virtio0.discard', label: 'Pass on discards', shown: hasDisk('virtio0') },
      ],
    },
    {
      title: 'CPU and memory',
      fields: [
        { name: 'cores', label: 'CPU cores' },
        { name: 'sockets', label: 'CPU sockets' },
        { name: 'memory', label: 'Memory (MiB)' },
      ],
    },
    {
      title: 'Network',
      fields: [
        { name: 'net0.bridge', label: 'Bridge', source: 'bridges' },
        { name: 'net0.model', label: 'Model', shown: hasBridge },
        { name: 'net0.macaddr', label: 'MAC address', shown: hasBridge },
        { name: 'net0.tag', label: 'VLAN tag', shown: hasBridge },
      ],
    },
  ],
  initial: { 'virtio0:size': '8', 'net0.model': 'virtio', cores: '1', memory: '1024', serial0: 'socket' },
};

export const WIZARDS = { ct: CONTAINER, vm: MACHINE } as const;

/** Values that are sent, in the order of the fields: none of a hidden field, since what it hangs on is not there. */
export function sentValues(spec: WizardSpec, values: Values): Values {
  const fields = spec.steps.flatMap((step) => step.fields);
  const hidden = new Set(fields.filter((field) => field.shown && !field.shown(values)).map((field) => field.name));
  const names = [...new Set([...fields.map((field) => field.name), ...Object.keys(values)])];
  const sent = names.filter((name) => name !== 'node' && !hidden.has(name) && values[name] !== undefined);
  return Object.fromEntries(sent.map((name) => [name, values[name] ?? '']));
}

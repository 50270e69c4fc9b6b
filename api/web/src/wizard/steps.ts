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
  /** Words to choose from, of a field that is the wizard's own and no parameter. */
  own?: readonly string[];
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

/** The wizard's own field for what the first disk is on. */
const BUS = 'bus';

const staticAddress = (key: string) => (values: Values) => (values[key] ?? '').includes('/');
const hasDisk = (key: string) => (values: Values) => Boolean(values[`${key}:storage`]);
const isCopied = (key: string) => (values: Values) => Boolean(values[`${key}.import-from`]);
const bootsFirmware = (values: Values) => !values['kernel'];
const bootsKernel = (values: Values) => Boolean(values['kernel']);
const hasVariables = (values: Values) => bootsFirmware(values) && values['bios'] === 'ovmf';
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
        { name: 'net0.host-managed', label: 'The host asks for the address', shown: (values) => hasBridge(values) && values['net0.ip'] === 'dhcp' },
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
        { name: 'ide2.file', label: 'Disc in the CD-ROM drive', source: 'volumes/iso', needed: true },
        { name: 'bios', label: 'Firmware', shown: bootsFirmware },
        { name: 'efidisk0:storage', label: 'Storage of its variables', source: 'storages/images', shown: hasVariables },
        { name: 'efidisk0.pre-enrolled-keys', label: 'Secure Boot with known keys', shown: hasVariables },
        { name: 'kernel', label: 'Kernel instead of firmware', source: 'volumes/snippets' },
        { name: 'initrd', label: 'Initial RAM disk', source: 'volumes/snippets', shown: bootsKernel },
        { name: 'cmdline', label: 'Kernel command line', shown: bootsKernel },
      ],
    },
    {
      title: 'Disk',
      fields: [
        { name: BUS, label: 'Bus', own: ['scsi', 'virtio'], needed: true },
        { name: 'scsi0:storage', label: 'Storage', source: 'storages/images' },
        { name: 'scsi0.import-from', label: 'Copy of', source: 'volumes/import', shown: hasDisk('scsi0') },
        { name: 'scsi0:size', label: 'Size (GiB)', shown: (values) => hasDisk('scsi0')(values) && !isCopied('scsi0')(values) },
        { name: 'scsi0.format', label: 'Format', shown: hasDisk('scsi0') },
        { name: 'scsi0.cache', label: 'Cache', shown: hasDisk('scsi0') },
        { name: 'scsi0.discard', label: 'Pass on discards', shown: hasDisk('scsi0') },
      ],
    },
    {
      title: 'CPU and memory',
      fields: [
        { name: 'cores', label: 'CPU cores' },
        { name: 'sockets', label: 'CPU sockets' },
        { name: 'cpu', label: 'CPU type', source: 'cpus' },
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
  initial: {
    'ide2.file': 'none',
    'ide2.media': 'cdrom',
    bios: 'ovmf',
    'efidisk0:size': '1',
    [BUS]: 'scsi',
    'scsi0:size': '8',
    'net0.model': 'virtio',
    cores: '1',
    memory: '1024',
    serial0: 'socket',
  },
};

export const WIZARDS = { ct: CONTAINER, vm: MACHINE } as const;

/** Values that are sent, in the order of the fields: none of a hidden field, since what it hangs on is not there. */
export function sentValues(spec: WizardSpec, values: Values): Values {
  const fields = spec.steps.flatMap((step) => step.fields);
  const hidden = new Set(fields.filter((field) => field.shown && !field.shown(values)).map((field) => field.name));
  const names = [...new Set([...fields.map((field) => field.name), ...Object.keys(values)])];
  const own = new Set(['node', ...fields.filter((field) => field.own).map((field) => field.name)]);
  const sent = names.filter((name) => !own.has(name) && !hidden.has(name) && values[name] !== undefined);
  const disk = (name: string) => (values[BUS] === 'virtio' ? name.replace(/^scsi0/, 'virtio0') : name);
  const all = Object.fromEntries(sent.map((name) => [disk(name), values[name] ?? '']));
  // A copy has its source's size, which the API writes as 0.
  if (isCopied('scsi0')(values)) all[disk('scsi0:size')] = '0';
  return all;
}

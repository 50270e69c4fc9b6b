// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Names and states of guests and tasks in words.
import type { Guest, GuestStatus, Resource } from '../api/types';

export const KIND = { qemu: 'VM', lxc: 'Container' } as const;
export const SHORT_KIND = { qemu: 'VM', lxc: 'CT' } as const;

/** "101 (db)". */
export function guestTitle(guest: Pick<Guest, 'vmid' | 'name'>): string {
  return guest.name ? `${guest.vmid} (${guest.name})` : String(guest.vmid);
}

/** What a container's health command has found: "unhealthy, failed 3 times in a row: …". */
export function healthText(status: Pick<GuestStatus, 'health' | 'health-failures' | 'health-message'>): string {
  const failures = status['health-failures'] ?? 0;
  const times = failures === 1 ? 'failed once' : `failed ${failures} times in a row`;
  const message = status['health-message'];
  return [status.health ?? '', failures ? `, ${times}` : '', message ? `: ${message}` : ''].join('');
}

/** The OCI image that a container's key `image` names, as rows of facts: what it is called, what it listens on. */
export function imageFacts(value: unknown): [string, string][] {
  if (typeof value !== 'string') return [];
  const [digest = '', ...items] = value.split(',');
  const item = (name: string) => items.find((text) => text.startsWith(`${name}=`))?.slice(name.length + 1);
  const ports = item('ports')?.split(';').join(', ');
  return [['Image', item('name') ?? digest], ...(ports ? ([['Ports', ports]] as [string, string][]) : [])];
}

/** Page of a resource, for links. */
export function resourceLink(resource: Resource): string {
  switch (resource.type) {
    case 'qemu':
    case 'lxc':
      return `/guests/${resource.vmid}`;
    case 'node':
      return `/nodes/${encodeURIComponent(resource.node ?? '')}`;
    case 'storage':
      return `/nodes/${encodeURIComponent(resource.node ?? '')}/storage/${encodeURIComponent(resource.storage ?? '')}`;
    default:
      return '/';
  }
}

const TASK_WORDS: Record<string, string> = {
  create: 'create',
  start: 'start',
  stop: 'stop',
  shutdown: 'shut down',
  reboot: 'reboot',
  reset: 'reset',
  suspend: 'suspend',
  pause: 'pause',
  resume: 'resume',
  destroy: 'delete',
  config: 'configure',
  migrate: 'migrate',
  clone: 'clone',
  restore: 'restore',
  snapshot: 'snapshot',
  delsnapshot: 'delete snapshot',
  rollback: 'roll back',
  template: 'make template',
  unhealthy: 'end, since it does not work',
};

const OTHER_TASKS: Record<string, string> = {
  imgcopy: 'Upload',
  imgdel: 'Delete volume',
  download: 'Download',
  aplupdate: 'Refresh templates',
  resize: 'Resize disk',
  vncproxy: 'Console',
  vncshell: 'Shell',
  vzdump: 'Back up',
  startall: 'Start all guests',
  stopall: 'Stop all guests',
};

/** "vzcreate" of 101 -> "Container 101: create". */
export function taskTitle(type: string, id: string | undefined): string {
  const kind = type.startsWith('vz') ? 'Container' : type.startsWith('qm') ? 'VM' : null;
  const word = kind && TASK_WORDS[type.slice(2)];
  if (word) return id ? `${kind} ${id}: ${word}` : `${kind}: ${word}`;
  const title = OTHER_TASKS[type] ?? type;
  return id ? `${title} ${id}` : title;
}

export type Outcome = 'running' | 'ok' | 'warning' | 'failed';

/** How a task of a list stands; the list's status is the exit text, and absent or RUNNING while it runs. */
export function taskOutcome(status: string | undefined): Outcome {
  if (status === undefined || status === 'RUNNING' || status === 'running') return 'running';
  if (status === 'OK') return 'ok';
  return status.startsWith('WARNINGS') ? 'warning' : 'failed';
}

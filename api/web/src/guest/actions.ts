// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// What can be done to a guest as a whole: the call, who may, and when it fits.
import type { Guest } from '../api/types';
import type { Session } from '../api/session';

/** Power actions, in the order of the buttons. */
export interface PowerAction {
  name: 'start' | 'shutdown' | 'stop' | 'reboot' | 'reset' | 'suspend' | 'hibernate' | 'resume';
  label: string;
  /** The call below the guest's `status`, when it is not the name. */
  call?: string;
  /** Parameters of the call. */
  params?: Record<string, boolean>;
  /** States in which the action makes sense. */
  from: readonly string[];
  /** Only for this kind. */
  only?: Guest['type'];
  /** What is asked before; absent when the action can be undone by another one. */
  confirm?: string;
}

const UP = ['running'] as const;
const FROZEN = ['paused', 'suspended'] as const;

export const POWER_ACTIONS: readonly PowerAction[] = [
  { name: 'start', label: 'Start', from: ['stopped'] },
  { name: 'shutdown', label: 'Shut down', from: UP, confirm: 'The guest is asked to shut down in order.' },
  { name: 'reboot', label: 'Reboot', from: UP, confirm: 'The guest is asked to shut down in order, and then started again.' },
  { name: 'suspend', label: 'Pause', from: UP },
  {
    name: 'hibernate',
    label: 'Suspend to disk',
    call: 'suspend',
    params: { todisk: true },
    from: [...UP, ...FROZEN],
    only: 'qemu',
    confirm: 'The VM stands still while its memory is written to a volume, and then ends. Its next start goes on from there.',
  },
  { name: 'resume', label: 'Resume', from: FROZEN },
  { name: 'reset', label: 'Reset', from: [...UP, ...FROZEN], only: 'qemu', confirm: 'The VM restarts at once, as by its reset button. What it has not written to disk is lost.' },
  { name: 'stop', label: 'Stop', from: [...UP, ...FROZEN], confirm: 'The guest stops at once, as by pulling its plug. What it has not written to disk is lost.' },
];

/** The state that decides what fits: a VM's own word for it when it has one. */
export function stateOf(guest: Pick<Guest, 'status'>, qmpstatus?: string): string {
  return qmpstatus && guest.status === 'running' && qmpstatus === 'paused' ? 'paused' : (guest.status ?? 'unknown');
}

export function fits(action: PowerAction, guest: Guest, state: string): boolean {
  const locked = guest.lock && !(guest.lock === 'suspended' && action.name === 'start');
  return action.from.includes(state) && (action.only === undefined || action.only === guest.type) && !locked;
}

/** Whether the user has a privilege on guests somewhere; unknown counts as yes, since the server decides. */
export function may(session: Session | null, privilege: string): boolean {
  const vms = session?.capabilities?.['vms'];
  return !vms || Object.keys(vms).length === 0 || vms[privilege] === 1;
}

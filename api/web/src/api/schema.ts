// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The API's own description of its parameters, and the checks that follow from it. Forms are made of this; what it
// cannot decide (formats it does not know) is left to the server, whose answer is shown at the same field.
import { useQuery } from '@tanstack/react-query';

import { call, type Method } from './client';

/** One parameter, in the words of JSON schema as the API uses them. */
export interface Param {
  type: 'boolean' | 'integer' | 'number' | 'string';
  description?: string;
  optional?: number;
  default?: string | number;
  minimum?: number;
  maximum?: number;
  maxLength?: number;
  enum?: string[];
  /** Name of a form of text, or the keys of a property string. */
  format?: string | Record<string, Param>;
  /** The key of a property string that may be given as a bare value. */
  default_key?: string;
  /** How many members a numbered family such as net[n] has. */
  count?: number;
  /** What a config key does on this board when it is not simply what it says: nothing, or only the server sets it. */
  effect?: 'none' | 'server' | 'unavailable';
  /** The reason of the effect. */
  why?: string;
}

/** Whether a form may ask for it. */
export function canBeSet(param: Param): boolean {
  return param.effect !== 'server' && param.effect !== 'unavailable' && param.format !== 'unavailable';
}

export type Params = Record<string, Param>;

/** What one call of the API takes. */
export interface CallSchema {
  method: Method;
  path: string;
  description?: string;
  parameters: Params;
}

/** Reads the schema of one call; `template` is its path as the API lists it. */
export function useCallSchema(method: Method, template: string) {
  return useQuery({
    queryKey: ['schema', method, template],
    queryFn: ({ signal }) => call<CallSchema>('GET', '/atoll/schema', { method, path: template }, signal),
    staleTime: Infinity,
  });
}

/** The parameter that a key belongs to: net3 to net[n], otherwise its own. */
export function paramOf(params: Params, key: string): Param | undefined {
  return params[key] ?? params[key.replace(/\d+$/, '[n]')];
}

/** The parameter at "net0.bridge": a key of a property string; or at a plain key. */
export function paramAt(params: Params, field: string): Param | undefined {
  const [key, part] = field.split('.', 2) as [string, string?];
  const param = paramOf(params, key);
  if (!part) return param;
  return typeof param?.format === 'object' ? param.format[part] : undefined;
}

/** First free key of a numbered family: net[n] with net0 taken -> net1. */
export function freeKey(family: string, count: number, taken: Iterable<string>): string | null {
  const used = new Set(taken);
  for (let index = 0; index < count; index += 1) {
    const key = family.replace('[n]', String(index));
    if (!used.has(key)) return key;
  }
  return null;
}

const FORMATS: Record<string, { matches: RegExp; wants: string }> = {
  'dns-name': { matches: /^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$/, wants: 'Letters, digits, hyphens and dots, as in a DNS name.' },
  'mac-addr': { matches: /^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$/i, wants: 'A unicast MAC address such as BC:24:11:00:00:01.' },
  'pve-vmid': { matches: /^[1-9][0-9]{2,8}$/, wants: 'A number from 100 to 999999999.' },
  'pve-ipv4-config': { matches: /^(dhcp|manual|(\d{1,3}\.){3}\d{1,3}\/\d{1,2})$/, wants: 'dhcp, manual, or an address with its prefix length, such as 10.0.0.5/24.' },
  ipv4: { matches: /^(\d{1,3}\.){3}\d{1,3}$/, wants: 'An IPv4 address.' },
  'disk-size': { matches: /^\d+(\.\d+)?[KMGT]?$/, wants: 'A size such as 8G.' },
};

function checkNumber(param: Param, text: string): string | null {
  const wellFormed = param.type === 'integer' ? /^-?\d+$/ : /^-?\d+(\.\d+)?$/;
  if (!wellFormed.test(text)) return param.type === 'integer' ? 'A whole number is needed.' : 'A number is needed.';
  const number = Number(text);
  if (param.minimum !== undefined && number < param.minimum) return `At least ${param.minimum}.`;
  if (param.maximum !== undefined && number > param.maximum) return `At most ${param.maximum}.`;
  return null;
}

/** What is wrong with a field's text, or null. */
export function check(param: Param, text: string): string | null {
  if (text === '') return param.optional ? null : 'This is needed.';
  if (param.type === 'integer' || param.type === 'number') return checkNumber(param, text);
  if (param.enum && !param.enum.includes(text)) return `One of ${param.enum.join(', ')}.`;
  if (param.maxLength !== undefined && text.length > param.maxLength) return `At most ${param.maxLength} characters.`;
  const format = typeof param.format === 'string' ? FORMATS[param.format] : undefined;
  return format && !format.matches.test(text) ? format.wants : null;
}

const TRUE_WORDS = new Set(['1', 'on', 'yes', 'true']);

export function isTrue(value: string | number | undefined): boolean {
  return value !== undefined && TRUE_WORDS.has(String(value).toLowerCase());
}

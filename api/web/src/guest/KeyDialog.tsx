// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Sets one config key: a field, or a field for each key of a property string. The digest that was read with the value
// goes with the change, so that two administrators never overwrite each other unseen.
import { Button, Group, Modal, Stack, Text } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import { useMemo, useState, type FormEvent } from 'react';

import { ApiError, call } from '../api/client';
import { guestPath, refresh } from '../api/queries';
import { canBeSet, isTrue, paramOf, type Param, type Params } from '../api/schema';
import type { Guest } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { useChoices, type Source } from '../forms/choices';
import { Field } from '../forms/Field';
import { labelOf } from '../forms/labels';
import { checkFields, fieldParam, placeErrors, toParameters, type Values } from '../forms/values';
import { parse, type Properties } from '../lib/propertyString';
import { isDrive, isVolume } from './keys';

interface KeyDialogProps {
  guest: Guest;
  keyName: string;
  params: Params;
  value: string | undefined;
  digest: string | undefined;
  onClose: () => void;
}

const VOLUME_KEYS = new Set(['file', 'volume']);

/** The short form of a network device, virtio=MAC, in the long one's keys. */
function longForm(format: Record<string, Param>, properties: Properties): Properties {
  const short = Object.keys(properties).find((part) => !(part in format) && format['model']?.enum?.includes(part));
  if (!short) return properties;
  const { [short]: address = '', ...rest } = properties;
  return { model: short, macaddr: address, ...rest };
}

/** The fields for a key, and what they hold now. A new disk asks for a storage and a size. */
export function fieldsFor(key: string, param: Param, value: string | undefined): { names: string[]; values: Values } {
  if (param.type === 'boolean') return { names: [key], values: { [key]: isTrue(value ?? param.default) ? '1' : '0' } };
  if (typeof param.format !== 'object') return { names: [key], values: { [key]: value ?? '' } };
  const parts = Object.entries(param.format).filter(([, own]) => canBeSet(own)).map(([part]) => part);
  if (parse(value ?? '', param.default_key)['media'] === 'cdrom' || (value === undefined && isDrive(key))) {
    // A drive has a disc and nothing else to choose.
    const { size: _, ...drive } = value === undefined ? { file: 'none', media: 'cdrom' } : parse(value, param.default_key);
    return { names: [`${key}.file`], values: Object.fromEntries(Object.entries(drive).map(([part, text]) => [`${key}.${part}`, text])) };
  }
  if (key === 'efidisk0' && value === undefined) return { names: [`${key}:storage`, `${key}.pre-enrolled-keys`], values: { [`${key}:size`]: '1' } };
  const fresh = value === undefined && isVolume(key);
  const names = parts.filter((part) => !VOLUME_KEYS.has(part) && !(part === 'size' && isVolume(key))).map((part) => `${key}.${part}`);
  if (fresh) return { names: [`${key}:storage`, `${key}:size`, ...names], values: { [`${key}:size`]: '8' } };
  const current = longForm(param.format, parse(value ?? '', param.default_key));
  // What the form does not show (the volume, keys this page does not know) is kept as it is.
  const values = Object.fromEntries(Object.entries(current).map(([part, text]) => [`${key}.${part}`, text]));
  return { names, values };
}

function sourceOf(guest: Guest, name: string): Source | null {
  if (name.endsWith('.bridge')) return 'bridges';
  if (name.endsWith('.file')) return 'volumes/iso';
  if (name.endsWith('.cputype')) return 'cpus';
  if (name.endsWith(':storage')) return guest.type === 'lxc' ? 'storages/rootdir' : 'storages/images';
  return name === 'kernel' || name === 'initrd' ? 'volumes/snippets' : null;
}

function useSave({ guest, keyName, params, value, digest, onClose }: KeyDialogProps) {
  return useMutation({
    mutationFn: async (values: Values) => {
      const text = toParameters(params, values)[keyName];
      if (text === value) return null;
      return call('PUT', `${guestPath(guest)}/config`, { ...(text === undefined ? { delete: keyName } : { [keyName]: text }), digest });
    },
    onSuccess: onClose,
    onSettled: refresh,
  });
}

export function KeyDialog({ guest, keyName, params, value, digest, onClose }: KeyDialogProps) {
  const param = paramOf(params, keyName) as Param;
  // The value and digest of the moment the dialog opened: a poll meanwhile must not replace what is being typed.
  const [opened] = useState({ digest, ...fieldsFor(keyName, param, value) });
  const [values, setValues] = useState(opened.values);
  const [touched, setTouched] = useState(false);
  const sources = useMemo(() => opened.names.map((name) => sourceOf(guest, name)).filter((source) => source !== null), [guest, opened.names]);
  const choices = useChoices(guest.node, sources);
  const save = useSave({ guest, keyName, params, value, digest: opened.digest, onClose });
  const needed = new Set(opened.names.filter((name) => name.includes(':') || name.endsWith('.file')));
  const wrong = checkFields(params, opened.names, values, needed);
  const refused = save.error instanceof ApiError ? placeErrors(save.error.errors, opened.names) : {};
  const errors = { ...refused, ...(touched ? wrong : {}) };
  const submit = (event: FormEvent) => {
    event.preventDefault();
    setTouched(true);
    if (Object.keys(wrong).length === 0) save.mutate(values);
  };
  const file = opened.names.includes(`${keyName}.file`) ? undefined : (values[`${keyName}.file`] ?? values[`${keyName}.volume`]);
  return (
    <Modal opened onClose={onClose} title={labelOf(keyName)}>
      <form onSubmit={submit} noValidate>
        <Stack gap="sm">
          {opened.names.length > 1 && param.description && (
            <Text size="sm" c="dimmed">
              {param.description}
            </Text>
          )}
          {file && <Text size="sm" className="atoll-mono">{file}</Text>}
          {opened.names.map((name, index) => {
            const own = fieldParam(params, name);
            const source = sourceOf(guest, name);
            return (
              own && (
                <Field
                  key={name}
                  name={name}
                  label={opened.names.length === 1 && !name.endsWith('.file') ? labelOf(keyName) : labelOf(name.split(/[.:]/)[1] ?? name)}
                  param={own}
                  value={values[name] ?? ''}
                  onChange={(next) => setValues((all) => ({ ...all, [name]: next }))}
                  error={errors[name]}
                  choices={source ? choices.get(source) : undefined}
                  needed={needed.has(name)}
                  autoFocus={index === 0}
                />
              )
            );
          })}
          <ErrorNote error={save.error} />
          <Group justify="flex-end" gap="xs">
            <Button variant="default" onClick={onClose}>
              Cancel
            </Button>
            <Button type="submit" loading={save.isPending}>
              Save
            </Button>
          </Group>
        </Stack>
      </form>
    </Modal>
  );
}
